"""Word lists from which the invented world is drawn."""

from __future__ import annotations


def words(text: str) -> list[str]:
    """Splits a list that is written as one string."""
    return text.split()


FEMALE_FIRST_NAMES = words(
    "Ada Alma Anna Berta Carla Clara Cora Dora Edith Ella Elsa Emma Erna Eva Flora Freya Greta Hanna "
    "Helen Ida Ines Irma Jana Julia Karin Lara Lena Lisa Lotte Mara Maria Marta Mina Nadia Nora Olga "
    "Paula Petra Rosa Ruth"
)
MALE_FIRST_NAMES = words(
    "Adam Albert Anton Arno Bruno Carl Conrad David Edgar Emil Erik Felix Franz Georg Gustav Hugo Igor "
    "Ivan Jacob Jonas Karl Kurt Leo Lukas Marco Martin Max Milo Nils Oscar Otto Paul Peter Robert Rolf "
    "Simon Thomas Tom Viktor Walter"
)

SURNAME_STEMS = words(
    "Ald Ash Ber Bram Cald Car Col Dan Dun Eld Elm Far Fen Gar Gil Had Hart Hol Ken Kir Lang Lin Mal Mar "
    "Mor Nor Oak Pem Quen Rad Ros Sel Sten Tal Thorn Tor Ul Var Wes Wil"
)
SURNAME_ENDINGS = words(
    "bury by dale den ford gate ham hurst ley low man mont more ner son sted ton ward well wick"
)

COUNTRIES_AND_CITIES = {
    "Aldoria": ("Brenholm", "Castovar", "Dunhaven", "Elmsport"),
    "Belmark": ("Fairwater", "Glimmen", "Harrowgate", "Istrava"),
    "Cordania": ("Jorvane", "Kestrel", "Lumbridge", "Merovin"),
    "Drevia": ("Northolm", "Ostrava", "Pellmoor", "Quillon"),
    "Estmere": ("Ravenna", "Silverton", "Tarrow", "Umberfall"),
    "Farlund": ("Velmora", "Westbrook", "Yarrowby", "Zellin"),
    "Gondara": ("Amberley", "Birkdale", "Corvessa", "Dorrin"),
    "Hestova": ("Eskerton", "Fallowby", "Grimsund", "Hollin"),
    "Ivoria": ("Ironbay", "Jasperton", "Kirrow", "Lindwell"),
    "Jutmark": ("Mossgate", "Nettleham", "Orrinsund", "Pinewick"),
    "Kelvany": ("Queensferry", "Rookhaven", "Saltmarsh", "Thornby"),
    "Lorvania": ("Upwell", "Vintermoor", "Wolfsburg", "Yewdale"),
}

EMPLOYERS = words(
    "Acmera Bluefin Brightline Clearpath Dynavolt Evergreen Fernworks Goldleaf Halcyon Inkstone Jetstream "
    "Kingfisher Lanternix Moonrise Northwind Oakridge Paragon Quickstep Redwood Skylark Starforge "
    "Sunfield Tidewater Trailhead Unicorp Vanguard Wavecrest Windmill Xylotech Yellowtail Zenithal "
    "Zephyrus"
)

# Every profession begins with a consonant sound, so that "a" always fits before it.
PROFESSIONS = words(
    "baker barber butcher carpenter chemist cook dancer dentist doctor driver farmer gardener judge "
    "lawyer librarian mechanic miner nurse painter pilot plumber sailor singer tailor teacher weaver"
)
