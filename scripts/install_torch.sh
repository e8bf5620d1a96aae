# Which build of torch a machine gets.   Sourced by make_venv.sh and make_vllm_venv.sh.
#
# TORCH decides where it is set. Else a machine with a GPU takes PyPI's build for CUDA, macOS takes PyPI's build, and
# any other machine takes the "+cpu" wheel. Where pip finds no such wheel, it takes what pip has.

gpu_listed() {
    [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]]
}

torch_builds() { # VERSION: the builds to try, in this order
    if [ -n "${TORCH:-}" ]; then
        echo "$TORCH"
    elif [ "$(uname -s)" = Darwin ]; then
        echo "torch==$1"
    elif gpu_listed; then
        echo "torch===$1 torch==$1" # "==" would prefer a "+cpu" wheel of the same version, "===" passes over it
    else
        echo "torch==$1+cpu torch==$1"
    fi
}

install_torch() { # VERSION PIP…: installs the first build that pip has, and leaves its name in $torch
    local builds output missing=
    read -ra builds <<<"$(torch_builds "$1")"
    shift
    for torch in "${builds[@]}"; do
        [ -z "$missing" ] || say_other_build "$missing"
        if output=$("$@" "$torch" 2>&1); then
            return
        fi
        [[ $output == *"No matching distribution found for torch"* ]] || break
        missing=$torch
    done
    echo "$output" >&2
    echo "$(basename "$0"): $torch was not installed, pip says why above; TORCH=… names another build" >&2
    return 1
}

say_other_build() { # BUILD THAT PIP LACKS
    case $1 in
    *+cpu) echo "$(basename "$0"): pip has no $1; installing PyPI's build, whose CUDA libraries make it 2.8 GB to" \
        "download (PIP_EXTRA_INDEX_URL can name PyTorch's CPU wheels, see its 'Get Started' page)" ;;
    *) echo "$(basename "$0"): pip has no $1 without a suffix; installing the build that it has" ;;
    esac
}

constraints_beside() { # LOCK BUILD: the pins that fit the build; a CUDA build brings the triton that it needs
    case $2 in
    *+cpu) cat "$1" ;;
    *) grep -v '^triton==' "$1" ;;
    esac
}
