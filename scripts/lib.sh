# Sourced by the training scripts.

# The plugin beside these scripts, so that they work from any directory.
USER_DIR="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/fairseq_moe"

# Print a command as it could be typed, then run it in place of this shell; with DRY_RUN=1 only print it.
run() {
  local word line='$'
  for word in "$@"; do
    if [[ "$word" =~ ^[A-Za-z0-9_./:=,+-]+$ ]]; then
      line+=" $word"
    else
      line+=" ${word@Q}"
    fi
  done
  printf '%s\n' "$line"
  if [[ -z "${DRY_RUN:-}" ]]; then
    exec "$@"
  fi
}
