#!/bin/bash
# Pack vLLM, what it needs and this checkout for a machine with a GPU and no network.
#
# Usage: pack.sh FOLDER [MIB]. FOLDER gets kit.00, kit.01, … of at most MIB mebibytes (60), their
# sums and unpack.sh. VLLM=0.32.0 names the version; FULL=1 leaves its libraries whole.
# Needs package registries, xz, unzip and binutils.
set -euo pipefail
here=$(realpath "$(dirname "$0")")
checkout=$(realpath "$here/../..")
folder=$(realpath -m "$1")
mib=${2:-60}
version=${VLLM:-0.32.0}
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fetch() {
    local platforms=() n
    # pip takes a platform as it stands: none stands for the older ones.
    for n in 2_5 2_12 2_17 2_24 2_26 2_27 2_28 2_31 2_34 1 2010 2014; do
        platforms+=(--platform "manylinux${n/#2_/_2_}_x86_64")
    done
    "$python" -m pip download --disable-pip-version-check -qq --no-deps --only-binary=:all: \
        --python-version 3.12 --implementation cp "${platforms[@]}" -d "$work/wheels" "$@"
}

# Everything but the kernels of a 16-bit Llama on a Hopper GPU, and its sources.
thin() {
    local keep='_C_stable_libtorch|_moe_C_stable_libtorch|_vllm_fa3_C|cumem_allocator|spinloop'
    rm -rf vllm/vllm-rs vllm/third_party/{deep_gemm,fmha_sm100,tml_fa4}
    rm -rf vllm/entrypoints/serve/instrumentator/static vllm-*.dist-info/{RECORD,sboms}
    find . -name '*.json' -path '*config*' -delete
    find . -type f -regextype posix-extended -regex '.*\.(h|hpp|cuh|cu|inl)' -delete
    find . -name '*.so' | grep -vE "/($keep|fs_io_C|_rust_\w+)\.abi3\.so$" | xargs -r rm
    if [ -z "${FULL:-}" ]; then
        local name
        for name in vllm/{_C_stable_libtorch,_moe_C_stable_libtorch,vllm_flash_attn/_vllm_fa3_C}; do
            "$python" "$here/lean.py" "$name.abi3.so" "$work/lean.so"
            mv "$work/lean.so" "$name.abi3.so"
        done
    fi
    find . -name '*.so' -exec strip --strip-all {} +
}

echo "fetching vLLM $version and what it needs"
fetch "vllm==$version"
fetch -r "$here/packages.txt"
mkdir "$work/site" "$work/vllm"
for wheel in "$work"/wheels/*.whl; do
    case ${wheel##*/} in
    vllm-*) unzip -q "$wheel" -d "$work/vllm" ;;
    *) unzip -q -o "$wheel" -d "$work/site" ;;
    esac
    rm "$wheel"
done

echo "taking what a 16-bit model on one Hopper GPU needs"
(cd "$work/vllm" && thin)
cp -r "$work"/vllm/* "$work/site/"
(
    cd "$work/site"
    rm -rf ./*.data pycountry/locales mistral_common/data/* supervisor/tests
    find . \( -name __pycache__ -o -name tests -o -name '*.dist-info/sboms' \) -type d -prune \
        -exec rm -rf {} +
    find . -name '*.pyi' -delete
    find . -name '*.so*' -type f -exec strip --strip-all {} + 2>/dev/null || true
)

echo "adding this checkout"
mkdir "$work/source"
git -C "$checkout" ls-files -z -- sleb_serve plugins benchmarks/sleb_bench pyproject.toml README.md \
    LICENSE | tar c -C "$checkout" --null -T - | tar x -C "$work/source"
mkdir -p "$work/source/benchmarks"
"$python" -m pip wheel --disable-pip-version-check -qq --no-deps ${BUILD_OPTIONS:-} \
    -w "$work/own" "$work/source"
unzip -q -o "$work"/own/*.whl -d "$work/site"
mkdir "$work/site/kit"
cp "$here"/*.py "$work/site/kit/"
git -C "$checkout" describe --always --dirty --abbrev=40 >"$work/site/kit/commit"

rm -rf "$folder"
mkdir -p "$folder"
cp "$here/unpack.sh" "$folder/"
tar c -C "$work/site" --sort=name --owner=0 --group=0 --mtime=@0 . | xz -7 -T0 |
    split -b "${mib}M" -d -a 2 - "$folder/kit."
(cd "$folder" && sha256sum kit.[0-9]* >SHA256SUMS)
du -sm "$work/site" | awk '{print $1, "MiB unpacked"}'
ls -l "$folder"
