#!/usr/bin/env bash
# Installs the units, users, folders and example settings. Run by `make install-systemd`.
#
#   DESTDIR    where to put the tree (a package's build root); empty = this machine
#   UNITDIR    default /usr/local/lib/systemd/system   (packages: /usr/lib/systemd/system)
#   PREFIX     default /usr/local, for sysusers.d, tmpfiles.d and documentation
#   SYSCONFDIR default /etc
#   VENV       default /opt/facelane, the virtual environment that the units run
#   MPS_CONTROL default /usr/bin/nvidia-cuda-mps-control
#
# Settings that exist are left alone. On this machine (no DESTDIR) users and folders are
# made and systemd reads the units anew; nothing is enabled or started.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
DESTDIR=${DESTDIR:-}
PREFIX=${PREFIX:-/usr/local}
UNITDIR=${UNITDIR:-$PREFIX/lib/systemd/system}
SYSCONFDIR=${SYSCONFDIR:-/etc}
VENV=${VENV:-/opt/facelane}
MPS_CONTROL=${MPS_CONTROL:-/usr/bin/nvidia-cuda-mps-control}

for folder in "$PREFIX" "$UNITDIR" "$SYSCONFDIR" "$VENV" "$MPS_CONTROL"; do
    case $folder in
        /*) ;;
        *)
            echo "install: $folder is not an absolute path" >&2
            exit 64
            ;;
    esac
done

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

install -d -m 0755 "$DESTDIR$UNITDIR" "$DESTDIR$PREFIX/lib/sysusers.d" \
    "$DESTDIR$PREFIX/lib/tmpfiles.d" "$DESTDIR$SYSCONFDIR/facelane" \
    "$DESTDIR$PREFIX/share/doc/facelane/examples"

for unit in "$here"/system/*; do
    sed -e "s|@VENV@|$VENV|g" -e "s|@MPS_CONTROL@|$MPS_CONTROL|g" \
        -e "s|/usr/share/doc/facelane|$PREFIX/share/doc/facelane|g" \
        "$unit" >"$scratch/unit"
    install -m 0644 "$scratch/unit" "$DESTDIR$UNITDIR/$(basename "$unit")"
done
install -m 0644 "$here/sysusers.d/facelane.conf" "$DESTDIR$PREFIX/lib/sysusers.d/facelane.conf"
install -m 0644 "$here/tmpfiles.d/facelane.conf" "$DESTDIR$PREFIX/lib/tmpfiles.d/facelane.conf"
install -m 0644 "$here"/examples/* "$DESTDIR$PREFIX/share/doc/facelane/examples/"
for page in operations configuration bridge events console fleet tracing zones; do
    if [ -f "$root/docs/$page.md" ]; then
        install -m 0644 "$root/docs/$page.md" "$DESTDIR$PREFIX/share/doc/facelane/$page.md"
    fi
done
# The server starts with these; a camera's address cannot be guessed, so the bridge's
# example stays among the documentation.
if [ ! -e "$DESTDIR$SYSCONFDIR/facelane/server.toml" ]; then
    install -m 0644 "$here/examples/server.toml" "$DESTDIR$SYSCONFDIR/facelane/server.toml"
fi

if [ -z "$DESTDIR" ]; then
    systemd-sysusers "$PREFIX/lib/sysusers.d/facelane.conf"
    systemd-tmpfiles --create "$PREFIX/lib/tmpfiles.d/facelane.conf"
    # Nothing to reload in a container image or a chroot.
    if [ -d /run/systemd/system ]; then
        systemctl daemon-reload
    fi
    if [ ! -x "$VENV/bin/facelane-server" ]; then
        echo "install: $VENV/bin/facelane-server is missing. Next:"
        echo "  python3 -m venv $VENV && $VENV/bin/pip install '$root[server,cli,bridge]'"
    fi
    echo "install: done. Start with: systemctl enable --now facelane-server"
fi
