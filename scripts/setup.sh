# Sourced by scripts/jaxpg and scripts/test, which set $root to the repository's folder.

find_python() { # prints the first Python >= 3.11 that can make virtual environments
  local candidate found="" reason="none found"
  for candidate in python3 python3.13 python3.12 python3.11; do
    # A version manager's shim can exist and still fail, so each candidate is run.
    found=$("$candidate" -c 'import sys
print("%d.%d" % sys.version_info[:2])
sys.exit(sys.version_info < (3, 11))' 2>/dev/null) || {
      [[ -z $found ]] || reason="$candidate is $found"
      continue
    }
    # Debian packs ensurepip apart from Python, and venv needs it.
    if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
      echo "$candidate"
      return
    fi
    reason="$candidate lacks venv: install it, for example apt install python$found-venv"
  done
  echo "jaxpg: needs Python >= 3.11 with venv on the PATH ($reason)" >&2
  return 1
}

accelerator() { # prints the extra of jax for this machine: cuda13, cuda12, or nothing for a CPU
  local known="cpu, cuda12, cuda13 or tpu" version=
  case ${JAXPG_JAX-} in
    cpu) return ;;
    cuda12 | cuda13 | tpu) echo "$JAXPG_JAX" && return ;;
    "") ;;
    *) echo "jaxpg: JAXPG_JAX=$JAXPG_JAX must be $known" >&2 && return 2 ;;
  esac
  # The driver says up to which CUDA it runs.
  version=$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p') || return 0
  [[ $version && $(uname -s) == Linux ]] || return 0
  if ((version >= 13)); then echo cuda13; elif ((version >= 12)); then echo cuda12; else
    echo "jaxpg: the NVIDIA driver runs CUDA $version and jax needs 12: a newer one would let jaxpg use the GPU" >&2
  fi
}

fingerprint() { # PIP-ARGUMENT...: changes when an installation would; a moved repository is one
  printf '%s\n' "$root" "$@" | cat - "$root/pyproject.toml" "$root/scripts/constraints.txt" | cksum
}

installed() { # STAMP FINGERPRINT
  [[ -x ${1%/*}/bin/python && -r $1 && $(<"$1") == "$2" ]]
}

# ensure VENV EXTRA PIP-ARGUMENT...: this package, with the optional EXTRA, is installed in VENV.
ensure() {
  local venv=$root/$1 name=$1 extra=$2 want
  shift 2
  want=$(fingerprint "$@")
  local stamp=$venv/installed${extra:+-$extra}
  installed "$stamp" "$want" && return
  ( # The lock ends with this subshell, however it ends.
    if command -v flock >/dev/null; then
      flock -n 9 || {
        echo "jaxpg: waiting for another installation into $name ..." >&2
        flock 9
      }
      installed "$stamp" "$want" && exit
    fi
    # A python that runs is kept, whoever made it; anything else in its place is replaced.
    if ! "$venv/bin/python" -c '' 2>/dev/null; then
      python=$(find_python) || exit
      echo "jaxpg: installing into $name (first use only) ..." >&2
      "$python" -m venv --clear --without-pip "$venv" || exit
    else
      echo "jaxpg: installing into $name (first use only) ..." >&2
    fi
    case $extra in cuda*)
      echo "jaxpg: with jax for the NVIDIA GPU found, ${extra/cuda/CUDA } (5 GB); JAXPG_JAX=cpu leaves it out" >&2
      ;;
    esac
    rm -f "$venv"/installed* # no stamp while the installation is half done
    cd "$root" && python=$venv/bin/python &&
      { "$python" -m pip --version &>/dev/null || "$python" -m ensurepip --default-pip >/dev/null; } &&
      "$python" -m pip install -q --disable-pip-version-check -e ".${extra:+[$extra]}" "$@" >&2 || {
      echo "jaxpg: the installation into $name failed (see above); mend that and run again" >&2
      exit 1
    }
    for stamp in installed ${extra:+"installed-$extra"}; do # an extra includes the plain package
      echo "$want" >"$venv/$stamp"
    done
  ) 9>"$venv.lock"
}
