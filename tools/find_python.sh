# Sourced by the scripts that make an environment. find_python prints the name of a Python that coati runs on.

find_python() {
    # Run each one: a version manager leaves commands on PATH that exist but do not start.
    local check='import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))'
    for python in python3.11 python3.12 python3.10 python3 python; do
        if "$python" -c "$check" >/dev/null 2>&1; then
            echo "$python"
            return
        fi
    done
    echo "No Python 3.10, 3.11 or 3.12 with the venv module was found: install one (Debian: apt-get install" \
        "python3-venv) and run make again." >&2
    return 1
}
