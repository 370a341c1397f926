#!/usr/bin/env bash
# Downloads Llama 2 and Llama 3 weights from the signed URL in Meta's email, into folders that Llama.build reads.
# Runs on Linux and macOS (bash 3.2) with curl and either md5sum or md5. It knows nothing of Python.
#
# A file under its own name is whole, and has the md5 that the model's checklist.chk gives it. A file that is still
# coming is FILE.part, and the next run continues it. Nothing is written outside the target folder. The URL is a secret:
# curl reads it from standard input, where `ps` does not show it.
set -euf -o pipefail

USAGE="Usage: ./download.sh [--url URL] [--dir DIR] [MODEL...]

Downloads Llama weights with the signed URL from Meta's email (request it at https://www.llama.com/llama-downloads/).
Asks for the URL and the models if they are not given. Run it again to continue where it stopped.

  --url URL   the signed URL, in single quotes; LLAMA_URL in the environment does the same and stays out of \`ps\`
  --dir DIR   where the model folders go (default: the current folder)
  --list      the models; each goes by its name, its short name or its folder's name, in upper or lower case
  --help      this text

Exit status: 0 when every file is there and right, 1 when one is not (the summary says which and why), 2 when the
command is wrong, 130 when interrupted. Behind a proxy, set https_proxy=http://HOST:PORT."

MODELS="model                 short         shards  size   folder                    at Meta
llama-3-8b            8B            1       16GB   Meta-Llama-3-8B           8b_pre_trained
llama-3-8b-instruct   8B-Instruct   1       16GB   Meta-Llama-3-8B-Instruct  8b_instruction_tuned
llama-3-70b           70B           8       141GB  Meta-Llama-3-70B          70b_pre_trained
llama-3-70b-instruct  70B-Instruct  8       141GB  Meta-Llama-3-70B-Instruct 70b_instruction_tuned
llama-2-7b            7B            1       13GB   llama-2-7b                llama-2-7b
llama-2-13b           13B           2       26GB   llama-2-13b               llama-2-13b
llama-2-70b           llama-2-70b   8       138GB  llama-2-70b               llama-2-70b
llama-2-7b-chat       7B-chat       1       13GB   llama-2-7b-chat           llama-2-7b-chat
llama-2-13b-chat      13B-chat      2       26GB   llama-2-13b-chat          llama-2-13b-chat
llama-2-70b-chat      70B-chat      8       138GB  llama-2-70b-chat          llama-2-70b-chat"

HOW_TO_COPY="Select it in Meta's email as text, from https:// to its end (\"copy link address\" gives another URL)."
ABOUT_403="About 403: the server refused the link.
  - The link has expired: it lasts 24 hours and a limited number of downloads. Request a new one at
    https://www.llama.com/llama-downloads/ and run this again with it; the files so far are kept.
  - Or it does not cover this model: a link for Llama 2 does not open Llama 3.
  - Or it is not complete. $HOW_TO_COPY
    On a command line put it in single quotes: an & outside quotes ends it.
  - Or your network or country is refused: try another one."

say() { printf '%s\n' "$*" >&2; }
die() { say "download.sh: $*"; exit 2; }
ask() { say "$1"; ANSWER=''; read -r -e ANSWER || true; } # -e: a terminal itself cuts lines at 1,024 bytes on macOS
size_of() { if [ -f "$1" ]; then wc -c <"$1" | tr -d ' '; else echo 0; fi; }
md5_of() { if command -v md5sum >/dev/null; then md5sum <"$1" | cut -c 1-32; else md5 -q <"$1"; fi; }
is_page() { [ "$(head -c 64 "$1" | LC_ALL=C tr -d '\000\357\273\277[:space:]' | head -c 1)" = '<' ]; }

# Prints the md5 that the checklists beside FILE give it, if they do.
listed_md5() { # FILE
  { cat "${1%/*}/checklist.chk" "${1%/*}/tokenizer_checklist.chk" 2>/dev/null || true; } | tr -d '\r' |
    awk -v name="${1##*/}" '$2 == name || $2 == "*" name { md5 = tolower($1) } END { print md5 }'
}

# Downloads REMOTE whole into PART, and gives up after five attempts in a row that get no further. Fails with REASON
# and SKIP: what is not worth trying after this (file, model or all).
fetch() { # REMOTE PART
  local idle=0 code status size furthest; furthest=$(size_of "$2")
  while :; do
    code=0 SKIP=file
    status=$(printf 'url = "%s"\n' "${URL%%\**}$1${URL#*\*}" | curl --config - --globoff --fail --location \
      "$PROGRESS" --show-error --connect-timeout 30 --speed-limit 1 --speed-time 60 \
      --continue-at - --output "$2" --write-out '%{http_code}') || code=$?
    case $code/$status in
      0/* | */416) return 0 ;; # 416: PART is as long as the file, or longer; the md5 tells which
      22/403) REASON="403 Forbidden: the link was refused (see below)" SKIP=model; return 1 ;;
      22/408 | 22/429 | 22/5??) REASON="the server failed with status $status" ;;
      22/*) REASON="the server answered with status $status"; return 1 ;;
      23/*) REASON="curl cannot write $2: is the disk full?" SKIP=all; return 1 ;;
      33/* | 36/*) REASON="the server does not continue a partial file"; rm -f "$2" ;;
      *) REASON="no connection, or it broke off (curl error $code); behind a proxy, set https_proxy" ;;
    esac
    size=$(size_of "$2")
    idle=$((idle + 1))
    if [ "$size" -gt "$furthest" ]; then furthest=$size idle=0; fi
    if [ "$idle" -eq 5 ]; then SKIP=all; return 1; fi
    say "  $REASON; trying again in $((1 << idle)) s, from byte $size"
    sleep $((1 << idle))
  done
}

# Brings one file to its own name, whole and right. Fails with REASON and SKIP.
get() { # REMOTE FILE
  local file=$2 part=$2.part want resumed
  say "  $file"
  want=$(listed_md5 "$file")
  if [ -s "$file" ]; then
    if [ -z "$want" ] || [ "$(md5_of "$file")" = "$want" ]; then say "  already here"; return 0; fi
    say "  it does not have the md5 in the checklist; trying to complete it"
    mv -f "$file" "$part"
  fi
  if [ -z "$want" ]; then rm -f "$part"; fi # nothing would tell whether the two halves belong together
  resumed=$(size_of "$part")
  fetch "$1" "$part" || return 1
  if [ ! -s "$part" ]; then
    REASON="the server sent an empty file"
  elif is_page "$part"; then
    REASON="a web page came instead of the file: from a proxy, a login page, or a URL that is not the email's"
  elif [ "${file##*.}" = chk ] && ! grep -Eq '^[0-9a-fA-F]{32} ' "$part"; then
    REASON="what came is not a list of md5 sums"
  elif [ -n "$want" ] && [ "$(md5_of "$part")" != "$want" ]; then
    REASON="what came does not have the md5 in the checklist and was removed; run again to download it anew"
  else
    case $want:$file in :*.pth | :*.json | :*.model) say "  no checklist has its md5, so it was not checked" ;; esac
    REASON="$part cannot be renamed"
    mv -f "$part" "$file"; return
  fi
  rm -f "$part"
  if [ "$resumed" -eq 0 ]; then return 1; fi
  say "  the part from an earlier run does not fit; starting over"
  get "$1" "$file"
}

# Downloads a model: its checklists, then what they list, then the licence and the policy if the server has them. Fails
# when the whole run has to stop.
get_model() { # NAME SHARDS FOLDER REMOTE_FOLDER
  local folder=$3 at=$4 lists tokenizer policy files path shard
  case $1 in
    llama-2-*) tokenizer=tokenizer.model lists="$at/checklist.chk tokenizer_checklist.chk" policy=USE_POLICY.md ;;
    *) tokenizer=$at/tokenizer.model lists=$at/checklist.chk policy=USE_POLICY ;;
  esac
  files="$at/params.json $tokenizer"
  for ((shard = 0; shard < $2; shard++)); do files="$files $at/$(printf 'consolidated.%02d.pth' "$shard")"; done
  say "$1 -> $folder"
  mkdir -p "$folder"
  for path in $files; do # a file is missing: fetch the checklist anew, for Meta has corrected some
    [ -s "$folder/${path##*/}" ] || rm -f "$folder/checklist.chk" "$folder/tokenizer_checklist.chk"
  done
  for path in $lists $files; do
    if get "$path" "$folder/${path##*/}"; then continue; fi
    FAILED="$FAILED  $folder/${path##*/}: $REASON"$'\n'
    say "  FAILED: $REASON"
    case $SKIP$path in all*) return 1 ;; model* | *.chk) return 0 ;; esac
  done
  for path in LICENSE "$policy"; do
    get "$path" "$folder/$path" || say "  $path cannot be had here, which does no harm"
  done
}

find_model() { # any name of a model -> its line of MODELS, or nothing
  printf '%s\n' "$MODELS" | awk -v name="$(printf '%s' "${1#meta-llama/}" | tr '[:upper:]' '[:lower:]')" \
    'NR > 1 && (name == $1 || name == tolower($2) || name == tolower($5))'
}

main() {
  local url=${LLAMA_URL:-} dir=. names='' chosen='' name line model shards folder remote
  unset LLAMA_URL # curl and the others have no need of it
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help) printf '%s\n' "$USAGE"; exit 0 ;;
      --list) printf '%s\n' "$MODELS"; exit 0 ;;
      --url | --dir)
        if [ $# -lt 2 ]; then die "$1 needs a value"; fi
        if [ "$1" = --url ]; then url=$2; else dir=$2; fi; shift ;;
      --url=*) url=${1#*=} ;;
      --dir=*) dir=${1#*=} ;;
      -*) die "unknown option $1 (see --help)" ;;
      *) names="$names $1" ;;
    esac
    shift
  done
  command -v curl >/dev/null || die "curl is not installed; install it (for example: apt install curl)"
  command -v md5sum >/dev/null || command -v md5 >/dev/null || die "neither md5sum (Linux) nor md5 (macOS) is installed"
  if [ -t 2 ]; then PROGRESS=--progress-bar; else PROGRESS=--silent; fi
  if [ -z "$url" ]; then ask "The signed URL from Meta's email:"; url=$ANSWER; fi
  # Mail programs and shells add white space, line ends, quotes, brackets, backslashes, and &amp; for &.
  URL=$(printf '%s' "$url" | LC_ALL=C tr -cd '!-~' | tr -d "\\\\\"\`'<>" | sed 's/&amp;/\&/g')
  case $URL in
    '') die "no URL given. It is in Meta's email; request one at https://www.llama.com/llama-downloads/" ;;
    *://*://* | *%3[Aa]%2[Ff]*) die "this URL only redirects to the signed one. $HOW_TO_COPY" ;;
    http://*\**\?* | https://*\**\?*) ;;
    *) die "the signed URL looks like https://HOST/*?Policy=...&Signature=... and this one does not. $HOW_TO_COPY" ;;
  esac
  if [ -z "$names" ]; then ask "$MODELS"$'\n'"Models to download, separated by spaces or commas:"; names=$ANSWER; fi
  for name in ${names//,/ }; do
    line=$(find_model "$name")
    if [ -z "$line" ]; then die "no model is called '$name'. The models:"$'\n'"$MODELS"; fi
    case $chosen in *"$line"*) ;; *) chosen=$chosen$line$'\n' ;; esac
  done
  if [ -z "$chosen" ]; then die "no model given (--list shows them)"; fi
  { mkdir -p -- "$dir" && CDPATH='' cd -- "$dir"; } || die "the folder $dir cannot be used"
  trap 'say; say "Interrupted. Run the same command again to continue."; exit 130' INT
  FAILED=''
  while read -r model _ shards _ folder remote; do
    get_model "$model" "$shards" "$folder" "$remote" || break
  done < <(printf '%s' "$chosen")
  if [ -z "$FAILED" ]; then say "Done: every file is there."; exit 0; fi
  say $'\n'"Not everything was downloaded:"$'\n'"$FAILED"
  if [ "$SKIP" = all ]; then say "What comes after this file was not tried."; fi
  case $FAILED in *"403 Forbidden"*) say "$ABOUT_403" ;; esac
  say "Run the same command again to continue."
  exit 1
}

main "$@"
