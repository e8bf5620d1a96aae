# Completion of rltrain's commands, keys and choices in bash: source scripts/completion.bash
# The keys and choices come from Hydra, which composes the command line for it; that takes some seconds.

_rltrain() {
    local word=${COMP_WORDS[COMP_CWORD]} choices line
    if [ "$COMP_CWORD" -eq 1 ]; then
        choices=$(rltrain | sed -n 's/^  \([a-z.]*\) .*/\1/p')
    else
        line="rltrain $word" # Hydra expects no command before the keys
        choices=$(COMP_LINE=$line COMP_POINT=${#line} rltrain "${COMP_WORDS[1]}" -sc query=bash 2>/dev/null)
    fi
    COMPREPLY=($(compgen -o nospace -W "$choices" -- "$word"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=/}
complete -o nospace -F _rltrain rltrain
