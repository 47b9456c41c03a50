#!/usr/bin/env bash
# Sets up the daemon as a service of this machine, or removes it. Safe to run again: that is also the update.
set -euo pipefail
umask 022 # root's may be 077, and the service's user has to read all of this

usage() {
    cat <<'END'
sudo deploy/install.sh [OPTIONS]

  --from PATH     the checkout or wheel to install           [this checkout]
  --prefix DIR    where the program goes                     [/opt/edgert]
  --no-start      do not start the service
  --no-venv       place the files only, without the program
  --uninstall     remove the service and the program; settings, models and tokens stay
  --purge         with --uninstall: those as well, and the user
  --dry-run       say what would be done, and do nothing
  --destdir DIR   put everything below DIR, and leave users and services alone (for packages and tests)

It makes the user `edgert`, a virtual environment in /opt/edgert, /etc/edgert/edgert.toml, /var/lib/edgert for
models and state, /usr/local/bin/edgert, and the unit edgert.service.
PYTHON=python3.12 chooses another Python (3.11 or newer).
END
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
from=$(dirname "$here")
prefix=/opt/edgert
destdir=
start=yes venv=yes uninstall=no purge=no dry=no
user=edgert
state=/var/lib/edgert
settings=/etc/edgert
unit=/etc/systemd/system/edgert.service
link=/usr/local/bin/edgert
python=${PYTHON:-python3}

die() {
    printf 'error: %s\n' "$@" >&2
    exit 1
}

say() { printf '%s\n' "$*"; }

# Runs a command, or shows it.
run() {
    if [ $dry = yes ]; then
        printf ' '
        printf ' %q' "$@"
        printf '\n'
    else
        "$@"
    fi
}

# Writes standard input to a file in one step, or says so.
put() { # MODE FILE
    if [ $dry = yes ]; then
        cat >/dev/null
        say "  write $2 (mode $1)"
    else
        local new="$2.new.$$"
        cat >"$new"
        chmod "$1" "$new"
        mv -f "$new" "$2"
    fi
}

while [ $# -gt 0 ]; do
    case $1 in
        --from | --prefix | --destdir)
            [ $# -ge 2 ] || die "$1 needs a value"
            case $1 in
                --from) from=$2 ;;
                --prefix) prefix=${2%/} ;;
                --destdir) destdir=${2%/} ;;
            esac
            shift
            ;;
        --no-start) start=no ;;
        --no-venv) venv=no ;;
        --uninstall) uninstall=yes ;;
        --purge) purge=yes ;;
        --dry-run) dry=yes ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) die "unknown option $1; --help lists what there is" ;;
    esac
    shift
done

marker=$destdir$prefix/.edgert-installed
touches_system() { [ -z "$destdir" ]; }
systemd_runs() { touches_system && [ -d /run/systemd/system ] && command -v systemctl >/dev/null; }

check() {
    case $prefix in
        *[[:space:]]*) die "--prefix $prefix has a space in it, which units and scripts do not bear" ;;
        /*/* | /edgert*) ;;
        *) die "--prefix must be an absolute folder of its own, such as /opt/edgert (given: ${prefix:-nothing})" ;;
    esac
    [ -z "$destdir" ] || [[ $destdir == /* ]] || die "--destdir must be an absolute path"
    [ "$(uname -s)" = Linux ] || die "the service needs Linux; elsewhere start \`edgert serve\` yourself"
    [ $purge = no ] || [ $uninstall = yes ] || die "--purge goes with --uninstall"
    if touches_system && [ $dry = no ] && [ "$(id -u)" != 0 ]; then
        die "this makes a user and a service: run it with sudo (--dry-run shows what it would do)"
    fi
    [ $uninstall = no ] || return 0
    local missing=()
    if [ $venv = yes ]; then
        if [ -e "$destdir$prefix" ] && [ ! -e "$marker" ] && [ -n "$(ls -A "$destdir$prefix")" ]; then
            die "$destdir$prefix is there and was not made by this script; choose another --prefix, or remove it"
        fi
        [ -e "$from" ] || die "--from $from: there is no such file or folder"
        case $from in
            *.whl) ;;
            *) [ -f "$from/pyproject.toml" ] || die "--from $from: neither a wheel nor a checkout (no pyproject.toml)" ;;
        esac
        if command -v "$python" >/dev/null; then
            check_python
        else
            missing+=("$python (3.11 or newer; another one: PYTHON=python3.12)")
        fi
    fi
    if touches_system && ! id "$user" >/dev/null 2>&1 && ! command -v useradd >/dev/null; then
        missing+=("useradd (Debian: the package passwd), or a user $user made by hand")
    fi
    if [ ${#missing[@]} -gt 0 ]; then
        printf 'missing: %s\n' "${missing[@]}" >&2
        exit 1
    fi
}

# A virtual environment goes on using the Python that made it, and the service sees nobody's home.
check_python() {
    local where
    where=$("$python" -c 'import os, sys; print(os.path.realpath(sys.base_prefix))') || die "$python does not start"
    case $where in
        /root | /root/* | /home/* | /run/user/*)
            if touches_system; then
                die "$python is in $where, where the service cannot read it; take the system's: PYTHON=/usr/bin/python3"
            fi
            say "note: $python is in $where, where no other user can read it"
            ;;
    esac
}

make_user() {
    touches_system || return 0
    if id "$user" >/dev/null 2>&1; then
        say "user $user is there"
        return 0
    fi
    say "making the user $user"
    local shell=/usr/sbin/nologin
    [ -x $shell ] || shell=/bin/false
    run useradd --system --user-group --home-dir "$state" --no-create-home --shell "$shell" "$user"
}

make_folders() {
    run mkdir -p "$destdir$prefix" "$destdir$settings" "$destdir$(dirname "$unit")" "$destdir$(dirname "$link")"
    run mkdir -p "$destdir$state"
    run chmod 755 "$destdir$prefix" "$destdir$settings" "$destdir$state"
    if touches_system; then
        run chown "$user:$user" "$state"
    fi
}

make_venv() {
    [ $venv = yes ] || return 0
    say "installing the program into $destdir$prefix"
    say "edgert" | put 644 "$marker"
    PACKAGE=$(cd "$(dirname "$from")" && pwd)/$(basename "$from")
    export PACKAGE PYTHON=$python
    run "$here/prepare.sh" "$destdir$prefix" "${EXTRA:-}"
    run ln -sfn "$prefix/bin/edgert" "$destdir$link"
}

# Every key with its explanation, all commented out: a default that gets better reaches this machine too.
make_settings() {
    local file=$destdir$settings/edgert.toml
    if [ -e "$file" ]; then
        say "$file is there; it stays as it is"
        return 0
    fi
    say "writing $file"
    {
        printf '# Settings of edgert.service. Remove a leading "#" from a key to change it, then:\n'
        printf '#   sudo systemctl restart edgert\n#\n'
        if [ $venv = yes ] && [ $dry = no ]; then
            env -i PATH="$PATH" EDGERT_HOME=/nonexistent "$destdir$prefix/bin/edgert" config show --explain |
                sed 's/^\([a-z_]* = \)/#\1/'
        else
            printf '# Every key: edgert config show --explain\n'
        fi
    } | put 644 "$file"
}

make_unit() {
    say "writing $destdir$unit"
    sed "s|@prefix@|$prefix|g" "$here/edgert.service" | put 644 "$destdir$unit"
}

start_service() {
    touches_system || return 0
    if ! systemd_runs; then
        say "systemd does not run here, so that nothing is started. By hand:"
        say "  runuser -u $user -- env EDGERT_HOME=$state $prefix/bin/edgert serve"
        return 0
    fi
    run systemctl daemon-reload
    run systemctl enable --quiet edgert.service
    if [ $start = yes ] && [ $venv = yes ]; then
        say "starting the service"
        run systemctl restart edgert.service ||
            die "the service does not start; \`journalctl -u edgert -n 30\` says why"
        say "it runs: \`edgert ps\`, \`edgert logs\`, \`systemctl status edgert\`"
    fi
}

remove() {
    if systemd_runs && systemctl cat edgert.service >/dev/null 2>&1; then
        say "stopping the service"
        run systemctl disable --quiet --now edgert.service || true
    fi
    say "removing the program and the unit"
    run rm -f "$destdir$unit"
    if [ -L "$destdir$link" ] && [ "$(readlink "$destdir$link")" = "$prefix/bin/edgert" ]; then
        run rm -f "$destdir$link"
    fi
    if [ -e "$marker" ]; then
        run rm -rf -- "$destdir$prefix"
    elif [ -d "$destdir$prefix" ]; then
        run rmdir "$destdir$prefix" 2>/dev/null || say "$destdir$prefix was not made by this script; it stays"
    fi
    if systemd_runs; then
        run systemctl daemon-reload
    fi
    if [ $purge = no ]; then
        say "kept: $destdir$settings (settings), $destdir$state (models, tokens), the user $user; --purge removes them"
        return 0
    fi
    say "removing settings, models, tokens and the user"
    run rm -rf -- "$destdir$settings" "$destdir$state"
    if touches_system && id "$user" >/dev/null 2>&1; then
        run userdel "$user" || say "the user $user stays: something of it still runs"
    fi
}

check
if [ $uninstall = yes ]; then
    remove
    exit 0
fi
make_user
make_folders
make_venv
make_settings
make_unit
start_service
say "done"
