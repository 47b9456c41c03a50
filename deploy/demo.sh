#!/usr/bin/env bash
# The main job on the demo model: what it is, what it knows, how it writes, how fast.
set -euo pipefail

show() {
    printf '\n$'
    for word in "$@"; do
        case $word in
            *' '*) printf " '%s'" "$word" ;;
            *) printf ' %s' "$word" ;;
        esac
    done
    printf '\n'
    "$@"
}

show edgert models show demo
show edgert run 'Where does Paul Colton live?'
show edgert run 'In which country does Paul Colton live?'
show edgert run --raw --seed 1 --max-tokens 60 'One rainy morning Paul Colton'
show edgert bench engine
printf '\nGo on with: .venv/bin/edgert chat\n'
