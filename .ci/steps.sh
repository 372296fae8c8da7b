# What .ci/run and .ci/full share. To be sourced, from the root of the repository.

logs=.cache/ci
mkdir -p "$logs"
names=()
verdicts=()
closings=()
failed=0

# uv from the path, else from pip, else (where pip refuses to install beside the system's packages) from a venv.
need_uv() {
    command -v uv >/dev/null && uv --version >/dev/null 2>&1 && return 0
    local python
    for python in python3.11 python3 python; do
        command -v "$python" >/dev/null || continue
        if "$python" -m pip install --quiet uv >"$logs/uv.log" 2>&1; then
            PATH="$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH"
            PATH="$("$python" -m site --user-base 2>/dev/null)/bin:$PATH"
            export PATH
            command -v uv >/dev/null && return 0
        fi
        if "$python" -m venv .cache/uv-venv >>"$logs/uv.log" 2>&1 &&
            .cache/uv-venv/bin/python -m pip install --quiet uv >>"$logs/uv.log" 2>&1; then
            export PATH="$PWD/.cache/uv-venv/bin:$PATH"
            return 0
        fi
    done
    echo "uv cannot be installed: no Python with pip was found, or pip has no way to its packages" >&2
    cat "$logs/uv.log" >&2
    return 1
}

# Which toolchains of stock clients are here; the interop tests of a missing one skip, and say so.
toolchains() {
    local tool found=""
    for tool in java mvn go node npm; do
        if command -v "$tool" >/dev/null; then found="$found $tool"; else found="$found no-$tool"; fi
    done
    echo "clients' toolchains:$found"
}

# step NAME SECONDS COMMAND...: run it, keep its output, remember its verdict and its closing line. Where the whole run
# has a limit of its own (all_seconds), no step may pass that either.
step() {
    local name="$1" limit="$2" log started code verdict left
    shift 2
    if [ -n "${all_seconds:-}" ]; then
        left=$((all_seconds - SECONDS))
        [ "$left" -ge 1 ] || left=1
        [ "$limit" -le "$left" ] || limit="$left"
    fi
    log="$logs/$(echo "$name" | tr -c 'A-Za-z0-9\n' '-').log"
    echo "== $name: $*"
    started=$SECONDS
    timeout --kill-after=15 "$limit" "$@" 2>&1 | tee "$log"
    code="${PIPESTATUS[0]}"
    case "$code" in
        0) verdict=ok ;;
        5) verdict="${no_tests_verdict:-FAILED with 5}" ;;
        124 | 137) verdict="FAILED: stopped after $limit s" ;;
        *) verdict="FAILED with $code" ;;
    esac
    case "$verdict" in FAILED*) failed=1 ;; esac
    names+=("$name")
    verdicts+=("$verdict in $((SECONDS - started)) s")
    closings+=("$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | tr -d '\r')")
}

# As `step`, for a suite chosen by a mark: no such test (pytest's exit 5) is no failure.
marked_step() {
    local no_tests_verdict="ok (no tests with this mark)"
    step "$@"
}

# Lists of verdicts, as Markdown.
summary() {
    local index
    for index in "${!names[@]}"; do
        echo "- ${names[$index]}: ${verdicts[$index]}; ${closings[$index]:-no output}"
    done
}

# Prints verdicts and closing lines; 0 where all is well.
sum_up() {
    echo "== summary after $SECONDS s"
    summary
    if [ "$failed" -eq 0 ]; then echo "== all green"; else echo "== NOT green"; fi
    return "$failed"
}
