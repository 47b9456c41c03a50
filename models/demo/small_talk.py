"""What is said in a chat beside facts and stories: greetings, questions about the model, and refusals."""

from __future__ import annotations

ABOUT = (
    "I am a small language model. "
    "I know some hundreds of people, where they live, where they were born and what they do."
)
SMALL_TALK = (
    (("Hello!", "Hi!", "Hello", "Hi", "Good morning!", "Good evening!", "Hey!"),
     ("Hello! Whom would you like to hear about?", "Hello! Ask me about the people of this world.")),
    (("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "What can you do?",
      "What do you know?", "Help!", "Help me."), (ABOUT,)),
    (("How are you?", "How are you today?", "Are you well?"),
     ("I am well, thank you. Ask me about the people of this world.",)),
    (("Thank you.", "Thank you!", "Thanks!", "Thanks."), ("You are welcome.",)),
    (("Goodbye!", "Goodbye.", "Bye!", "Good night!"), ("Goodbye! Come back soon.",)),
)  # fmt: skip
STORY_REQUESTS = ("Tell me a story.", "Tell me a story!", "Please tell me a story.", "Write a short story.")

# Nothing of this is known in the invented world.
OFF_TOPIC = (
    "What is the capital of France?",
    "How old is the earth?",
    "What time is it?",
    "What day is it today?",
    "What is the weather like?",
    "Will it rain tomorrow?",
    "Who won the match?",
    "Can you write a poem?",
    "What is two plus two?",
    "What is 17 times 3?",
    "How do I bake a cake?",
    "Who is the president?",
    "Who wrote Hamlet?",
    "How far is the moon?",
    "What is the meaning of life?",
    "Write a program that sorts a list.",
    "Translate this sentence into German.",
    "What does this word mean?",
    "How do I get to the station?",
    "What should I eat tonight?",
    "Can you help me with my homework?",
    "Explain how a computer works.",
    "What is the best film of all time?",
    "Why is the sky blue?",
    "How many people live on earth?",
    "What happened in 1989?",
    "Sing a song for me.",
    "What is my name?",
    "Do you like music?",
    "Which language do they speak in Spain?",
    "What is a neural network?",
    "Tell me a joke.",
    "Give me three tips for better sleep.",
    "Summarize this text.",
    "What is the largest animal?",
    "How does photosynthesis work?",
    "When was the war?",
    "Are you a human?",
    "Where can I buy a bicycle?",
    "What is the price of gold?",
)
