#!/usr/bin/env bash
# Downloads Llama 2 and Llama 3 weights from the signed URL that Meta mails, into folders that Llama.build reads.
# Runs on Linux and macOS (bash 3.2) with curl, or GNU wget where there is no curl. It knows nothing of Python.
#
# What is under a file's own name is whole and, where the model's checklist.chk names it, has that md5. What is still
# coming is FILE.part, and the next run goes on from there. Nothing is written outside the target folder, and the
# URL, which is a secret, reaches curl and wget by their standard input, where `ps` does not show it.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: ./download.sh [--url URL] [--dir DIR] [MODEL...]

Downloads Llama weights with the signed URL from Meta's email (request it at https://www.llama.com/llama-downloads/).
Asks for the URL and for the models where they are not given. Run it again to go on from where it stopped.

  --url URL   the signed URL, in single quotes; LLAMA_URL in the environment does the same and stays out of `ps`
  --dir DIR   where the model folders go (default: the current folder)
  --list      the models and the names they go by
  --help      this text

Models are separated by spaces or commas, in any case: llama-3-8b, 8B-Instruct, Meta-Llama-3-70B, 7B-chat ...

Environment: LLAMA_URL; https_proxy, http_proxy, no_proxy (as curl and wget read them); LLAMA_RETRIES, the attempts a
file gets (5); LLAMA_RETRY_WAIT, the seconds before the second one, doubled each time up to a minute (2).

Exits 0 when every file is there and right, 1 when one is not (the summary says which and why), 2 for a wrong command,
130 when interrupted.
TEXT
}

list_models() {
  cat <<'TEXT'
model                  also               shards  size     folder
llama-3-8b             8B                 1        16 GB   Meta-Llama-3-8B
llama-3-8b-instruct    8B-Instruct        1        16 GB   Meta-Llama-3-8B-Instruct
llama-3-70b            70B                8       141 GB   Meta-Llama-3-70B
llama-3-70b-instruct   70B-Instruct       8       141 GB   Meta-Llama-3-70B-Instruct
llama-2-7b             7B                 1        13 GB   llama-2-7b
llama-2-13b            13B                2        26 GB   llama-2-13b
llama-2-70b                               8       138 GB   llama-2-70b
llama-2-7b-chat        7B-chat            1        13 GB   llama-2-7b-chat
llama-2-13b-chat       13B-chat           2        26 GB   llama-2-13b-chat
llama-2-70b-chat       70B-chat           8       138 GB   llama-2-70b-chat
TEXT
}

# ---------------------------------------------------------------- what the user gave

say() { printf '%s\n' "$*" >&2; }

die() {
  say "download.sh: $*"
  exit 2
}

# Prints the one name of a model for any of the names it goes by; fails for a name that is none.
canonical_name() {
  local name
  name=$(printf '%s' "$1" | tr '[:upper:]_' '[:lower:]-')
  name=${name#meta-llama/}
  name=${name#meta-}
  case $name in
    8b | 8b-instruct | 70b | 70b-instruct) name=llama-3-$name ;;
    7b | 13b | 7b-chat | 13b-chat | 70b-chat) name=llama-2-$name ;;
  esac
  list_models | awk -v name="$name" 'NR > 1 && $1 == name { found = 1 } END { exit !found }' || return 1
  printf '%s' "$name"
}

# Sets FAMILY (2 or 3), REMOTE (its folder behind the URL), FOLDER (here) and SHARDS of a canonical name.
describe_model() {
  case $1 in
    llama-3-*) FAMILY=3 ;;
    *) FAMILY=2 ;;
  esac
  case $1 in
    llama-3-8b) REMOTE=8b_pre_trained FOLDER=Meta-Llama-3-8B SHARDS=1 ;;
    llama-3-8b-instruct) REMOTE=8b_instruction_tuned FOLDER=Meta-Llama-3-8B-Instruct SHARDS=1 ;;
    llama-3-70b) REMOTE=70b_pre_trained FOLDER=Meta-Llama-3-70B SHARDS=8 ;;
    llama-3-70b-instruct) REMOTE=70b_instruction_tuned FOLDER=Meta-Llama-3-70B-Instruct SHARDS=8 ;;
    llama-2-7b*) REMOTE=$1 FOLDER=$1 SHARDS=1 ;;
    llama-2-13b*) REMOTE=$1 FOLDER=$1 SHARDS=2 ;;
    llama-2-70b*) REMOTE=$1 FOLDER=$1 SHARDS=8 ;;
  esac
}

# Prints the URL without what mail programs, browsers and shells add to it: white space and line ends anywhere, quotes,
# zsh's backslashes, characters outside ASCII, and &amp; for &. None of these can be part of a URL.
clean_url() {
  local url added='\\"<>`'"'"
  url=$(printf '%s' "$1" | LC_ALL=C tr -cd '!-~' | tr -d "$added" | sed -e 's/&\(amp;\)\{1,\}/\&/g')
  case ${url%%\?*} in
    *'*'*) ;;
    *%2[Aa]*) url=${url%%%2[Aa]*}'*'${url#*%2[Aa]} ;;
  esac
  printf '%s' "$url"
}

# Dies, saying what to do, when URL cannot be the signed one; nothing has been asked of any server by then.
check_url() {
  local host query=''
  [ -n "$URL" ] || die "no URL given. It is in Meta's email; request one at https://www.llama.com/llama-downloads/"
  case $URL in
    http://* | https://*) ;;
    *) die "the URL must start with https:// - copy it from Meta's email from its first to its last character" ;;
  esac
  host=${URL#*://}
  host=${host%%[/?#]*}
  # A redirect carries the real URL in its own, encoded as urldefense does or as all others do.
  case $URL in *\?*) query=${URL#*\?} ;; esac
  case "$host ?$query" in
    *urldefense* | *\?*http*%3[Aa]%2[Ff]* | *\?*http*://*)
      die "this URL is a redirect by $host, such as \"copy link address\" yields. Select the URL in Meta's email as" \
        "text, from https:// to its end, and copy that" ;;
  esac
  case ${URL%%\?*} in
    *'*'*) ;;
    *) die "the URL has no * before its ? - the signed URL looks like https://HOST/*?Policy=...&Signature=... and the" \
      "file's name goes where the * is. Select it in Meta's email as text (not \"copy link address\")" ;;
  esac
}

# Asks on standard input; with readline on a terminal, which alone would cut a line at 1,024 bytes on macOS.
ask() {
  ANSWER=
  if [ -t 0 ]; then
    read -r -e -p "$1 " ANSWER || true
  else
    printf '%s\n' "$1" >&2
    read -r ANSWER || true
  fi
}

# ---------------------------------------------------------------- one request

size_of() { if [ -f "$1" ]; then wc -c <"$1" | tr -d ' '; else echo 0; fi; }

# Cuts a file back to its first N bytes (macOS has no truncate).
cut_to() { dd if=/dev/null of="$1" bs=1 seek="$2" 2>/dev/null; }

md5_of() {
  case $MD5 in
    md5sum) md5sum <"$1" | cut -c 1-32 ;;
    md5) md5 -q <"$1" ;;
  esac
}

# A web or XML page by its first character; Llama 2's binary tokenizer.model starts "\n\016\n\005<unk>" and is none.
is_page() {
  [ "$(head -c 64 "$1" | LC_ALL=C tr -d '\000\357\273\277 \t\r\n' | head -c 1)" = "<" ]
}

# Each client appends to PART what it lacks, and sets STATUS (HTTP, 000 for none), TYPE (Content-Type) and PROBLEM:
# '' (the file is whole), http, range (the server will not go on from here), disk, tls, host, network.
curl_request() { # URL PART
  local out code=0
  out=$(printf 'url = "%s"\n' "$1" | curl --config - --globoff --fail --location --max-redirs 5 --proto '=http,https' \
    --connect-timeout 30 --speed-limit 1 --speed-time 60 "${SHOW[@]}" \
    --continue-at "$(size_of "$2")" --output "$2" --write-out '%{http_code} %{content_type}') || code=$?
  STATUS=${out%% *}
  TYPE=${out#* }
  case $code in
    0) PROBLEM='' ;;
    22) PROBLEM=http ;;
    33 | 36) PROBLEM=range ;;
    23) PROBLEM=disk ;;
    51 | 60 | 77) PROBLEM=tls ;;
    5 | 6) PROBLEM=host ;;
    *) PROBLEM=network ;;
  esac
}

wget_request() { # URL PART
  local log code=0
  log=$(printf '%s\n' "$1" | wget --input-file=- --output-file=/dev/stdout --no-verbose --server-response --no-hsts \
    --tries=1 --timeout=60 --max-redirect=5 "${SHOW[@]}" --continue --output-document="$2") || code=$?
  STATUS=$(printf '%s\n' "$log" | awk '$1 ~ /^HTTP\// { status = $2 } END { print status ? status : "000" }')
  TYPE=$(printf '%s\n' "$log" | tr -d '\r' |
    awk '$1 ~ /^HTTP\// { type = "" } tolower($1) == "content-type:" { type = $2 } END { print type }')
  case $code in
    0) PROBLEM='' ;;
    8) PROBLEM=http ;;
    3) PROBLEM=disk ;;
    5) PROBLEM=tls ;;
    *) PROBLEM=network ;;
  esac
}

# One request for REMOTE_FILE into PART; PROBLEM as above, or page, where a page came instead of the file, or empty. No
# page leaves a byte in PART.
request() { # REMOTE_FILE PART
  local before
  before=$(size_of "$2")
  # The first * is where the name goes.
  "${CLIENT}_request" "${URL%%\**}$1${URL#*\*}" "$2"
  case $STATUS in
    416) PROBLEM=range ;;
    4?? | 5??) PROBLEM=http ;;
    2??)
      # The whole file where the rest was asked for: curl stops, wget passes over as many bytes as PART has.
      if [ "$STATUS" = 200 ] && [ "$before" -gt 0 ]; then PROBLEM=range; fi
      case $TYPE in
        text/html* | application/xhtml* | application/xml* | text/xml*) PROBLEM=page ;;
      esac ;;
  esac
  if [ -s "$2" ] && is_page "$2"; then
    PROBLEM=page before=0
  fi
  if [ "$PROBLEM" = page ] && [ -f "$2" ]; then cut_to "$2" "$before"; fi
  if [ ! -s "$2" ]; then
    rm -f "$2"
    if [ -z "$PROBLEM" ]; then PROBLEM=empty; fi
  fi
}

# ---------------------------------------------------------------- one file

reason() { # why the last request failed, for people
  case $PROBLEM in
    http)
      case $STATUS in
        403) echo "403 Forbidden: the link was refused (see below)" ;;
        404) echo "404 Not Found: the server has no such file" ;;
        407) echo "407: the proxy wants a user and password (https_proxy=http://USER:PASSWORD@HOST:PORT)" ;;
        5??) echo "the server failed ($STATUS); try again later" ;;
        *) echo "the server answered $STATUS" ;;
      esac ;;
    page) echo "the server (or a proxy, or a login page) sent a web page instead of the file; it was not kept" ;;
    empty) echo "the server sent an empty file" ;;
    range) echo "the server does not continue a partial file" ;;
    disk) echo "cannot write: no space left on the device? ($(df -Pk "$DIR" | awk 'NR == 2 { print $4 }') KiB free)" ;;
    tls) echo "the server's TLS certificate was not accepted; behind a proxy that re-signs, give its CA to $CLIENT" ;;
    host) echo "host not found; no network, or a proxy is needed (set https_proxy)" ;;
    network) echo "the connection failed or broke off; no network, or a proxy is needed (set https_proxy)" ;;
  esac
}

# Brings REMOTE_FILE whole into PART, in as many requests as it takes. An attempt that brings it a MiB further than any
# before does not count. Fails with REASON, PROBLEM and STATUS.
fetch() { # REMOTE_FILE PART MD5_KNOWN
  local attempt=1 pause=$RETRY_WAIT furthest size
  furthest=$(size_of "$2")
  while :; do
    request "$1" "$2"
    case $PROBLEM in
      '') return 0 ;;
      range)
        # 416: PART is as long as the file, or longer; an md5 will tell which.
        if [ "$STATUS" = 416 ] && [ -f "$2" ] && [ -n "$3" ]; then return 0; fi
        if [ -f "$2" ]; then
          say "  the server does not continue this file; starting it over"
          rm -f "$2"
          continue
        fi ;;
    esac
    REASON=$(reason)
    case $PROBLEM$STATUS in
      network* | host* | http408 | http429 | http5??) ;;
      *) return 1 ;;
    esac
    size=$(size_of "$2")
    if [ "$size" -ge $((furthest + 1048576)) ]; then
      furthest=$size attempt=1 pause=$RETRY_WAIT
    fi
    if [ "$attempt" -ge "$RETRIES" ]; then return 1; fi
    attempt=$((attempt + 1))
    say "  $REASON; attempt $attempt of $RETRIES from byte $size"
    if [ "$pause" -gt 0 ]; then sleep "$pause"; fi
    pause=$((pause * 2 > 60 ? 60 : pause * 2))
  done
}

# The md5 that the checklists of a model's folder give a file, or nothing.
listed_md5() { # FOLDER NAME
  local list
  for list in "$1/checklist.chk" "$1/tokenizer_checklist.chk"; do
    [ -f "$list" ] || continue
    tr -d '\r' <"$list" |
      awk -v name="$2" '{ sub(/^[*]/, "", $2); sub(/^[.]\//, "", $2) } $2 == name { print tolower($1); exit }'
  done | head -n 1
}

matches() { [ "$(md5_of "$1")" = "$2" ]; }

fail() { # PATH REASON
  FAILED="$FAILED  $1: $2
"
  say "  FAILED $1: $2"
}

# Brings one file to its own name, checked; fails, and says so in the summary, when it cannot.
get() { # REMOTE_FILE FOLDER NAME
  local file=$2/$3 part=$2/$3.part want resumed
  want=$(listed_md5 "$2" "$3")
  if [ -s "$file" ]; then
    if [ -z "$want" ] || matches "$file" "$want"; then
      say "  $3: already here"
      return 0
    fi
    say "  $3: here, but its md5 is not the listed one; trying to complete it"
    mv -f "$file" "$part"
  fi
  say "  $3"
  while :; do
    resumed=$(size_of "$part")
    if ! fetch "$1" "$part" "$want"; then
      fail "$file" "$REASON"
      return 1
    fi
    if [ -z "$want" ] || matches "$part" "$want"; then break; fi
    rm -f "$part"
    if [ "$resumed" -eq 0 ]; then
      fail "$file" "the md5 of what arrived is not the one in checklist.chk; removed (run again to fetch it anew)"
      return 1
    fi
    say "  $3: does not match after resuming; starting it over"
  done
  if ! mv -f "$part" "$file"; then
    fail "$file" "could not be renamed from $part"
    return 1
  fi
  if [ -z "$want" ]; then say "  $3: in no checklist, so its md5 was not checked"; fi
}

# As get, for a checklist or a licence: small, in no checklist, so never continued from an earlier run.
get_afresh() { # REMOTE_FILE FOLDER NAME
  rm -f "$2/$3.part"
  if fetch "$1" "$2/$3.part" ''; then mv -f "$2/$3.part" "$2/$3"; else return 1; fi
}

get_checklist() { # REMOTE_FILE FOLDER NAME
  if ! get_afresh "$@"; then
    fail "$2/$3" "$REASON"
  elif ! awk '$1 ~ /^[0-9a-fA-F]+$/ && length($1) == 32 { found = 1 } END { exit !found }' "$2/$3"; then
    rm -f "$2/$3"
    fail "$2/$3" "not a list of md5 sums; removed"
  else
    return 0
  fi
  return 1
}

# ---------------------------------------------------------------- one model

# The files of a model that must be there, besides the checklists.
model_files() {
  local shard=0
  echo params.json
  echo tokenizer.model
  while [ "$shard" -lt "$SHARDS" ]; do
    printf 'consolidated.%02d.pth\n' "$shard"
    shard=$((shard + 1))
  done
}

is_complete() { # FOLDER
  local name want
  [ -s "$1/checklist.chk" ] || return 1
  for name in $(model_files); do [ -s "$1/$name" ] || return 1; done
  for name in $(model_files); do
    want=$(listed_md5 "$1" "$name")
    if [ -n "$want" ] && ! matches "$1/$name" "$want"; then return 1; fi
  done
}

# The files Llama 2 keeps once for all its models are fetched once: a later model copies them from an earlier one.
copy_from_sibling() { # FOLDER NAME
  local other
  if [ -s "$1/$2" ]; then return 0; fi
  for other in "$DIR"/llama-2-*/"$2"; do
    if [ -s "$other" ]; then
      { cp "$other" "$1/$2.part" && mv -f "$1/$2.part" "$1/$2"; } || rm -f "$1/$2.part"
      return 0
    fi
  done
}

# LICENSE and policy, where the server has them.
get_papers() { # FOLDER
  local name names='LICENSE USE_POLICY'
  if [ "$FAMILY" = 2 ]; then names='LICENSE USE_POLICY.md'; fi
  for name in $names; do
    if [ "$FAMILY" = 2 ]; then copy_from_sibling "$1" "$name"; fi
    if [ -s "$1/$name" ]; then continue; fi
    get_afresh "$name" "$1" "$name" || say "  $name: not to be had here, which does no harm ($STATUS)"
  done
}

# A refused link or a lost checklist ends the model; a full disk or a dead network ends the run.
get_model() { # CANONICAL_NAME
  local folder name remote failed_before=$FAILED
  describe_model "$1"
  folder=$DIR/$FOLDER
  say "$1 -> $folder"
  mkdir -p "$folder"
  if is_complete "$folder"; then
    say "  complete; nothing to fetch"
    return 0
  fi
  get_checklist "$REMOTE/checklist.chk" "$folder" checklist.chk || { stop_or_go; return 0; }
  if [ "$FAMILY" = 2 ]; then
    copy_from_sibling "$folder" tokenizer_checklist.chk
    if [ ! -s "$folder/tokenizer_checklist.chk" ]; then
      get_checklist tokenizer_checklist.chk "$folder" tokenizer_checklist.chk || { stop_or_go; return 0; }
    fi
    copy_from_sibling "$folder" tokenizer.model
  fi
  for name in $(model_files); do
    remote=$REMOTE/$name
    if [ "$FAMILY$name" = 2tokenizer.model ]; then remote=$name; fi
    if ! get "$remote" "$folder" "$name"; then
      stop_or_go
      if [ -n "$STOP" ] || [ "$STATUS" = 403 ]; then return 0; fi
    fi
  done
  if [ "$FAILED" = "$failed_before" ]; then get_papers "$folder"; fi
}

stop_or_go() {
  case $PROBLEM in
    disk | network | host | tls) STOP=yes ;;
    http) if [ "$STATUS" = 403 ]; then FORBIDDEN=yes; fi ;;
  esac
}

# ---------------------------------------------------------------- the command

explain_403() {
  cat >&2 <<'TEXT'

About 403: the server took the link for a bad or spent one.
  - A link lasts 24 hours and a limited number of downloads. Request a new one at
    https://www.llama.com/llama-downloads/ (the files so far are kept; run this again with the new link).
  - Copy it from the email as text, from https:// to its last character. "Copy link address" gives another URL.
  - On a command line put it in single quotes: an & outside quotes ends it.
  - A link opens one family: that of Llama 2 does not open Llama 3.
  - Some networks and countries are refused: try another, or a proxy (https_proxy=http://HOST:PORT).
TEXT
}

choose_tools() {
  if command -v curl >/dev/null 2>&1; then
    CLIENT=curl
    SHOW=(--silent)
    if [ -t 2 ]; then SHOW=(--progress-bar); fi
  elif command -v wget >/dev/null 2>&1; then
    CLIENT=wget
    SHOW=(--progress=dot:giga)
    if [ -t 2 ]; then SHOW=(--show-progress --progress=bar:force); fi
  else
    die "needs curl or wget, and neither is installed"
  fi
  if command -v md5sum >/dev/null 2>&1; then
    MD5=md5sum
  elif command -v md5 >/dev/null 2>&1; then
    MD5=md5
  else
    die "needs md5sum (Linux) or md5 (macOS), and neither is installed"
  fi
}

main() {
  local given='' models='' name url=${LLAMA_URL:-} canonical
  unset LLAMA_URL
  DIR=.
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help) usage; exit 0 ;;
      --list) list_models; exit 0 ;;
      --url | --dir)
        if [ $# -lt 2 ]; then die "$1 needs a value"; fi
        if [ "$1" = --url ]; then url=$2; else DIR=$2; fi
        shift ;;
      --url=*) url=${1#*=} ;;
      --dir=*) DIR=${1#*=} ;;
      -*) die "unknown option $1 (see --help)" ;;
      *) given="$given $1" ;;
    esac
    shift
  done
  RETRIES=${LLAMA_RETRIES:-5}
  RETRY_WAIT=${LLAMA_RETRY_WAIT:-2}
  case $RETRIES$RETRY_WAIT in
    *[!0-9]*) die "LLAMA_RETRIES and LLAMA_RETRY_WAIT are whole numbers, not '$RETRIES' and '$RETRY_WAIT'" ;;
  esac
  choose_tools

  if [ -z "$url" ]; then
    ask "The signed URL from Meta's email:"
    url=$ANSWER
  fi
  URL=$(clean_url "$url")
  check_url
  if [ -z "$given" ]; then
    list_models >&2
    ask "Models to download (names from the list, separated by commas or spaces):"
    given=$ANSWER
  fi
  set -f # names are not patterns
  for name in ${given//,/ }; do
    canonical=$(canonical_name "$name") || die "no model is called '$name'. The models:
$(list_models)"
    case " $models " in
      *" $canonical "*) ;;
      *) models="$models $canonical" ;;
    esac
  done
  set +f
  if [ -z "$models" ]; then die "no model named (--list shows them)"; fi

  case $DIR in
    /* | ./* | . | ..) ;;
    *) DIR=./$DIR ;;
  esac
  mkdir -p "$DIR"
  trap 'say ""; say "Interrupted. Run the same command again to go on from here."; exit 130' INT
  FAILED='' STOP='' FORBIDDEN=''
  for name in $models; do
    get_model "$name"
    if [ -n "$STOP" ]; then break; fi
  done

  if [ -z "$FAILED" ]; then
    say "Done: every file is there."
    return 0
  fi
  say ""
  say "Not everything was downloaded:"
  printf '%s' "$FAILED" >&2
  if [ -n "$STOP" ]; then say "The files after this one were not tried."; fi
  if [ -n "$FORBIDDEN" ]; then explain_403; fi
  say "Run the same command again to go on from here."
  return 1
}

main "$@"
