#!/bin/sh
# Makes the secrets of docker-compose.yml, each in a file of its own; those that are there stay.
#
#   sh docker/secrets.sh [FOLDER [ADDRESS]]     FOLDER: ./secrets
#
# ADDRESS: where further machines reach the first one; their four secrets come into FOLDER/for-nodes.
# To change a password remove its file, run this again, then `docker compose up --detach --force-recreate`.
# (The owner's password is set once, when the database is made: ALTER ROLE changes it.)
set -eu
umask 077

folder=${1:-secrets}
address=${2:-}

random() { head -c 32 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=\n'; }

once() { # NAME [PREFIX]: a secret that is made once
    [ -s "$folder/$1" ] || write "$1" "${2:-}$(random)"
}

write() { # NAME TEXT: whole, aside first
    printf '%s\n' "$2" >"$folder/$1.new"
    # Containers have users of their own and must read it; the folder keeps all others of this machine out.
    chmod 444 "$folder/$1.new"
    mv -f "$folder/$1.new" "$folder/$1"
}

database_url() { # ROLE PASSWORD HOST
    printf 'postgresql://%s:%s@%s:5432/tuneyard' "$1" "$(cat "$folder/$2")" "$3"
}

broker_url() { # HOST
    printf 'redis://:%s@%s:6379/0' "$(cat "$folder/broker_password")" "$1"
}

mkdir -p "$folder"
chmod 700 "$folder"
for name in owner_password api_password scheduler_password worker_password broker_password; do
    once "$name"
done
once session_secret
once first_api_key ty-

for name in store_access_key store_secret_key; do # empty until you write a bucket's keys into them
    [ -e "$folder/$name" ] || : >"$folder/$name"
    chmod 644 "$folder/$name"
done

write owner_database_url "$(database_url tuneyard owner_password postgres)"
for role in api scheduler worker; do
    write "${role}_database_url" "$(database_url "tuneyard_$role" "${role}_password" postgres)"
done
write broker_url "$(broker_url valkey)"
write valkey_conf "requirepass $(cat "$folder/broker_password")
save \"\"
appendonly no
maxmemory-policy noeviction
tcp-keepalive 60"

if [ -n "$address" ]; then
    mkdir -p "$folder/for-nodes"
    write for-nodes/worker_database_url "$(database_url tuneyard_worker worker_password "$address")"
    write for-nodes/broker_url "$(broker_url "$address")"
    for name in store_access_key store_secret_key; do
        cp -f "$folder/$name" "$folder/for-nodes/$name"
        chmod 644 "$folder/for-nodes/$name"
    done
    echo "copy $folder/for-nodes/* into the folder secrets of each further machine"
fi
echo "secrets are in $folder; the first API key is in $folder/first_api_key"
