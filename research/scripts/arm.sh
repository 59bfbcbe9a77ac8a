# Sourced by other scripts. One training run: left alone where it is done, gone on with where it was cut off.
arm() { # RECIPE RUN [ARGUMENT of rcc train …]
  [ -e "$2/config.json" ] && return
  local resume=(); [ -e "$2/recipe.yaml" ] && resume=(--resume)
  .venv/bin/rcc train "$1" --output "$2" "${resume[@]}" "${@:3}"
}
