#!/usr/bin/env bash
# Builds the Debian package: everything that the units run, in a virtual environment of the
# distribution's Python at /opt/facelane; units, users, settings, manual pages, completions.
# Run by `make deb`. Needs no root; downloads what the environment holds.
#
#   EXTRAS       default server,cli,bridge,events,console,fleet,otel,onnx,postgres,nvidia
#   TORCH_INDEX  default https://download.pytorch.org/whl/cpu (for a card: .../whl/cu130);
#                empty: pip's own index
#   PIP_ARGS     more for pip, such as --find-links
#   PYTHON       default /usr/bin/python3, whose minor version the package then depends on
#   COMPRESSION  default zstd; none, xz as dpkg-deb has them
#   DIST         default dist
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
EXTRAS=${EXTRAS:-server,cli,bridge,events,console,fleet,otel,onnx,postgres,nvidia}
TORCH_INDEX=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}
PIP_ARGS=${PIP_ARGS:-}
PYTHON=${PYTHON:-/usr/bin/python3}
COMPRESSION=${COMPRESSION:-zstd}
DIST=${DIST:-$root/dist}

for tool in dpkg-deb dpkg gzip; do
    command -v "$tool" >/dev/null || { echo "deb: needs $tool (apt-get install dpkg gzip)" >&2; exit 69; }
done
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || {
    echo "deb: $PYTHON has no venv (apt-get install python3-venv)" >&2
    exit 69
}
minor=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
next=$("$PYTHON" -c 'import sys; print("%d.%d" % (sys.version_info[0], sys.version_info[1] + 1))')
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' "$root/server/facelane_server/__init__.py")
architecture=$(dpkg --print-architecture)

stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
chmod 0755 "$stage"
venv=$stage/opt/facelane

# -- what runs
install -d "$stage/opt"
"$PYTHON" -m venv "$venv"
# shellcheck disable=SC2086 - PIP_ARGS are words
"$venv/bin/python" -m pip install -q --no-compile ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} $PIP_ARGS \
    -c "$root/constraints.txt" "$root[$EXTRAS]" shtab
"$venv/bin/python" "$root/docs/generate_manual.py" "$stage/manual"
"$venv/bin/python" -m pip uninstall -q -y shtab
"$venv/bin/python" -m pip uninstall -q -y pip setuptools 2>/dev/null || true
# Programs name the Python of where they will lie, not of where they were made.
grep -rlIZ --exclude-dir=lib "$venv" "$venv" | xargs -0 sed -i "s|$venv|/opt/facelane|g"
rm -f "$venv"/bin/activate* "$venv"/bin/Activate.ps1 "$venv"/bin/pip*
find "$venv" -name direct_url.json -delete
# Read by their hash alone: no service may write there, and no time of a file matters.
find "$venv" -name __pycache__ -prune -exec rm -rf {} +
"$PYTHON" -m compileall -q -j 0 --invalidation-mode unchecked-hash \
    -s "$venv" -p /opt/facelane "$venv/lib" >/dev/null || true

# -- units, users, settings
DESTDIR=$stage PREFIX=/usr UNITDIR=/usr/lib/systemd/system VENV=/opt/facelane \
    "$root/deploy/systemd/install.sh"
# A folder that purging takes away with what an administrator put there.
install -d "$stage/usr/bin" "$stage/usr/share/man/man1" \
    "$stage/usr/share/bash-completion/completions" "$stage/usr/share/zsh/vendor-completions" \
    "$stage/usr/share/fish/vendor_completions.d"
for program in facelane facelane-server facelane-bridge facelane-events facelane-console facelane-fleet; do
    ln -s "../../opt/facelane/bin/$program" "$stage/usr/bin/$program"
    gzip -9n <"$stage/manual/man1/$program.1" >"$stage/usr/share/man/man1/$program.1.gz"
done
install -m 0644 "$stage"/manual/bash/* "$stage/usr/share/bash-completion/completions/"
install -m 0644 "$stage"/manual/zsh/* "$stage/usr/share/zsh/vendor-completions/"
install -m 0644 "$stage"/manual/fish/* "$stage/usr/share/fish/vendor_completions.d/"
rm -rf "$stage/manual"
gzip -9n <"$root/CHANGELOG.md" >"$stage/usr/share/doc/facelane/changelog.gz"
{
    printf 'Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n'
    printf 'Upstream-Name: facelane\n\nFiles: *\nCopyright: the facelane authors\nLicense: Apache-2.0\n'
    printf 'Comment: The packages in /opt/facelane/lib have licences of their own, in their\n'
    printf ' *.dist-info folders.\n\nLicense: Apache-2.0\n'
    printf ' On Debian systems the text is in /usr/share/common-licenses/Apache-2.0.\n'
} >"$stage/usr/share/doc/facelane/copyright"

# -- the package itself
install -d "$stage/DEBIAN"
install -m 0755 "$here"/postinst "$here"/prerm "$here"/postrm "$stage/DEBIAN/"
# Settings that a console and a node of a fleet start with; read by their units alone.
install -m 0644 "$here/console.env" "$stage/etc/facelane/console.env"
printf '%s\n' /etc/facelane/server.toml /etc/facelane/console.env >"$stage/DEBIAN/conffiles"
size=$(du -sk --exclude=DEBIAN "$stage" | cut -f1)
cat >"$stage/DEBIAN/control" <<CONTROL
Package: facelane
Version: $version
Architecture: $architecture
Maintainer: the facelane authors <facelane@localhost>
Section: video
Priority: optional
Installed-Size: $size
Depends: python3 (>= $minor), python3 (<< $next), systemd | systemd-standalone-sysusers, systemd | systemd-standalone-tmpfiles, libgomp1, libglib2.0-0
Description: streaming video analytics for faces
 A gRPC server that recognises faces in camera streams with an identity, a trust
 score and a liveness verdict; a bridge for RTSP and HTTP cameras; delivery of
 events to MQTT, webhooks, NATS, files and syslog; a web console; a fleet of
 machines; and their command line.
CONTROL
install -d "$DIST"
package=$DIST/facelane_${version}_${architecture}.deb
dpkg-deb --root-owner-group -Z"$COMPRESSION" --build "$stage" "$package" >/dev/null
echo "deb: $package"
