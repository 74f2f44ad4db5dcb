#!/bin/sh
# Send requests to another server, once it is ready; ends when the one before has answered its last.
#
#   switch.sh 127.0.0.1:8002 -m m.json --blocks 6
set -eu
address=$1
shift
folder=$(dirname -- "$0")

until sleb-serve probe "http://$address" "$@"; do sleep 2; done

run_nginx() { nginx -e stderr -p "$folder" -c nginx.conf "$@"; }
printf 'server %s;\n' "$address" >"$folder/upstream.new"
mv "$folder/upstream.new" "$folder/upstream.conf"
run_nginx -t -q
before=$(pgrep -P "$(cat "$folder/nginx.pid")")
run_nginx -s reload
# Workers from before the reload live until they have passed on what they were asked.
for worker in $before; do
    while kill -0 "$worker" 2>/dev/null; do sleep 0.2; done
done
echo "requests go to $address; no request is left on the server before"
