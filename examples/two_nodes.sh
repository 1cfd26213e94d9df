#!/usr/bin/env bash
# Start two servers on this machine. Only the first knows the adapter `poet`; the second pulls it from the
# first one's memory, and still answers for it when the first is gone. Then stop.
#
#     . .venv/bin/activate && examples/two_nodes.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work="$(mktemp -d)"
first="" second=""
trap 'kill $first $second 2>/dev/null || true; wait; rm -rf "$work"' EXIT

python -c 'import secrets; print(secrets.token_hex(16))' >"$work/token"
peers=(--peer-plain --peer-token-file "$work/token") # plain: both peers are on this machine
options=(--port 0 --no-progress --kv-cache-bytes 64MiB --adapter-bytes 32MiB)

told() { # print the address that follows the words $2 in a server's output $1, once it is there
    for _ in $(seq 600); do
        sed -n "s|^$2 \([^ ]*[0-9]\).*|\1|p" "$1" | grep . && return
        sleep 0.1
    done
    echo "$1 does not say '$2'" >&2
    return 1
}

ask() { # ask the server at $1 for the adapter $2's answer to $3
    curl -sf --max-time 60 "$1/v1/chat/completions" -H 'Content-Type: application/json' \
        -d "{\"model\": \"$2\", \"messages\": [{\"role\": \"user\", \"content\": \"$3\"}], \"temperature\": 0}" |
        python -c 'import json, sys; print(json.load(sys.stdin)["choices"][0]["message"]["content"])'
}

python -m engine.serve "${options[@]}" --peer-listen 127.0.0.1:0 "${peers[@]}" \
    --lora poet=engine/demo/adapters/reverse >"$work/first" &
first=$!
peer="$(told "$work/first" 'peers may pull adapters at')"

python -m engine.serve "${options[@]}" --peer "$peer" "${peers[@]}" >"$work/second" &
second=$!
url="$(told "$work/second" 'ready at')"

echo "the second node, pulling: $(ask "$url" poet garden)"
kill "$first"
wait "$first"
first=""
echo "the second node, alone: $(ask "$url" poet planet)"
