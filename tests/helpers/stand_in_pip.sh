#!/usr/bin/env bash
# Stands in for python -m venv and python -m pip: writes down what would be installed. BUILDS lists the builds of torch
# that its index has.
case "$*" in
-c*) exit 0 ;;
*"-m venv "*)
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    ;;
*"-m pip "*)
    for word in "$@"; do
        [[ $word != torch=* || " $BUILDS " == *" $word "* ]] || {
            echo "ERROR: No matching distribution found for $word" >&2
            exit 1
        }
    done
    echo "$*" >>"$RECORD"
    ;;
esac
