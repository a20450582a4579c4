# shellcheck shell=bash disable=SC2034,SC2154
# Shared by the launch scripts: errors, flags, quoting and dry runs.
#
# A script names its sub-commands, its flags that take a value, and its
# switches, gives them their defaults, and calls `parse "$@"`. Its help is the
# comment at its top.

fail() {
  echo "error: $*" >&2
  exit 2
}

# Prints a word so that a shell reads it back as it was.
quote() {
  local mark="'" escaped="'\\''"
  if [[ $1 =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
    printf '%s' "$1"
  else
    printf "'%s'" "${1//$mark/$escaped}"
  fi
}

quote_all() {
  local word space=''
  for word; do
    printf '%s%s' "$space" "$(quote "$word")"
    space=' '
  done
}

# Runs a command, or prints it.
run() {
  if [[ $dry_run ]]; then
    quote_all "$@"
    echo
  else
    "$@"
  fi
}

help() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  exit 0
}

# Whether a list of words has this word.
lists() {
  [[ $2 =~ ^[a-z_-]+$ && " $1 " == *" $2 "* ]]
}

# Reads sub-command and flags into variables of the flags' names; what follows
# `--` into the array `arguments`.
parse() {
  dry_run='' action='' arguments=()
  local flag value
  while (( $# )); do
    flag=${1%%=*}
    flag=${flag#--}
    case $1 in
      -h | --help) help ;;
      --dry-run) dry_run=1 ;;
      --)
        shift
        arguments=("$@")
        break
        ;;
      --*)
        if [[ $1 != *=* ]] && lists "$switches" "$flag"; then
          value=1
        elif ! lists "$flags" "$flag"; then
          fail "$1 is no flag of ${0##*/}; --help lists them, and flags of" \
            "prefix_distill.main come after \`--\`."
        elif [[ $1 == *=* ]]; then
          value=${1#*=}
        else
          [[ ${2---} != --* ]] || fail "$1 needs a value."
          value=$2
          shift
        fi
        printf -v "${flag//-/_}" '%s' "$value"
        ;;
      *)
        [[ -z $action ]] ||
          fail "$1 comes after the sub-command $action; there can be one."
        action=$1
        ;;
    esac
    shift
  done
  [[ $action ]] || fail "no sub-command; it is one of: $actions."
  lists "$actions" "$action" ||
    fail "$action is no sub-command; it is one of: $actions."
}

# Ends unless these flags were given.
need() {
  local flag variable
  for flag; do
    variable=${flag//-/_}
    [[ ${!variable} ]] || fail "--$flag is missing; $action needs it."
  done
}

# Ends unless these flags, where given, are whole numbers above 0.
need_numbers() {
  local flag variable
  for flag; do
    variable=${flag//-/_}
    [[ -z ${!variable} || ${!variable} =~ ^[1-9][0-9]*$ ]] ||
      fail "--$flag is '${!variable}'; it is a whole number above 0."
  done
}

# Ends unless --name can name a resource of Google Cloud and Kubernetes.
need_name() {
  need name
  [[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail "--name is '$name'; it is up to 40 lower-case letters, digits and" \
      "hyphens, and starts with a letter."
}

# Ends unless `arguments` can go to prefix_distill.main.
need_arguments() {
  local argument found=''
  (( ${#arguments[@]} )) ||
    fail "nothing after \`--\`; flags of prefix_distill.main go there, such" \
      "as: -- --config=configs/math.py"
  for argument in "${arguments[@]}"; do
    case $argument in
      --workdir | --workdir=*)
        fail "$argument comes after \`--\`; give it before." ;;
      --distributed | --distributed=* | --num_processes* | --process_id*)
        fail "$argument comes after \`--\`; ${0##*/} sets it." ;;
      --config | --config=*) found=1 ;;
    esac
  done
  [[ $found ]] || fail "no --config after \`--\`; try --config=configs/math.py."
}

# Ends unless --workdir is a directory in a bucket, gs://BUCKET/DIR; splits it.
need_bucket() {
  need workdir
  [[ $workdir =~ ^gs://([a-z0-9][-_.a-z0-9]+)/+(.*[^/])/*$ ]] ||
    fail "--workdir is '$workdir'; it is a directory in a bucket that all" \
      "hosts can write to, gs://bucket/DIR (no bucket has capital letters)."
  bucket=${BASH_REMATCH[1]} directory=${BASH_REMATCH[2]}
}

# Ends if --workdir is in a bucket, where only a mounted one will do.
need_no_bucket() {
  [[ $workdir != gs:* ]] ||
    fail "--workdir is '$workdir'; mount the bucket (docs/clusters.md) and" \
      "give the directory it is mounted on."
}
