"""The statistics file as h5py sees it: check_h5py.py WRITER runs WRITER, which makes the file, and compares
every dataset and attribute with what write_statistics_example.cpp put in."""
import os
import subprocess
import sys
import tempfile

try:
    import h5py
    import numpy as np
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)

SITES = ["attn_in", "q", "k_pre_rope", "k_post_rope", "v", "o_in", "mlp_in", "down_in"]
LAYERS, KV_HEADS, HEAD_DIM, TOKENS, BINS = 2, 2, 4, 3, 40


def check(holds, what):
    if not holds:
        sys.exit(f"check_h5py: {what}")


def expected(layer, index):
    channels = KV_HEADS * HEAD_DIM if 2 <= index <= 4 else 5 + index
    base = 1000.0 * layer + 100.0 * index + np.arange(channels)
    histogram = np.zeros(BINS, np.uint64)
    histogram[index] = TOKENS * channels - 1
    histogram[-1] = 1
    return {
        "absmax": (base + 0.5).astype(np.float32), "absmean": base * 3 / TOKENS, "abssum": base * 3,
        "sumsq": base**2, "sum1": -base, "sum3": -(base * base * base), "sum4": base * base * base * base,
        "histogram": histogram, "count": np.array([TOKENS], np.uint64),
    }


def check_dataset(dataset, values):
    check(dataset.dtype == values.dtype, f"{dataset.name}: {dataset.dtype} instead of {values.dtype}")
    check(dataset.shape == values.shape, f"{dataset.name}: {dataset.shape} instead of {values.shape}")
    check(np.array_equal(dataset[()], values), f"{dataset.name}: other values")
    check(dataset.chunks == dataset.shape and dataset.compression is None, f"{dataset.name}: other storage")
    description = dataset.attrs["description"]
    text = description.decode() if isinstance(description, bytes) else str(description)
    check("unit" in text and len(text) > 20, f"{dataset.name}: description {text!r}")


def main(writer):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "statistics.h5")
        subprocess.run([writer, path], check=True)
        with h5py.File(path, "r") as file:
            check(sorted(file) == ["layers", "meta"], f"top level: {sorted(file)}")
            meta = {k: v.decode() if isinstance(v, bytes) else v for k, v in file["meta"].attrs.items()}
            check(meta == {"format_version": 1, "model_fingerprint": "00112233445566778899aabbccddeeff",
                           "text_fingerprint": "ffeeddccbbaa99887766554433221100", "tokens": TOKENS, "windows": 1,
                           "seed": 42, "layers": LAYERS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}, f"meta: {meta}")
            check(sorted(file["layers"]) == ["000", "001"], "layers")
            for layer, group in enumerate(file["layers"].values()):
                check(sorted(group) == sorted(SITES + ["k_pair_radius", "k_centre_gain", "q_products"]), f"{group.name}: {sorted(group)}")
                radius = 10 * layer + np.arange(KV_HEADS * HEAD_DIM // 2, dtype=np.float32) + np.float32(0.25)
                check_dataset(group["k_pair_radius"], radius.reshape(KV_HEADS, HEAD_DIM // 2))
                check_dataset(group["k_centre_gain"], 10.0 * layer + np.arange(KV_HEADS) - 0.75)
                products = 100.0 * layer + np.arange(KV_HEADS * HEAD_DIM**2) - 3.5
                check_dataset(group["q_products"], products.reshape(KV_HEADS, HEAD_DIM, HEAD_DIM))
                for index, site in enumerate(SITES):
                    wanted = expected(layer, index)
                    check(sorted(group[site]) == sorted(wanted), f"{group[site].name}: {sorted(group[site])}")
                    for name, values in wanted.items():
                        check_dataset(group[site][name], values)
    print(f"check_h5py: {LAYERS * (len(SITES) * 9 + 2)} datasets as h5py {h5py.__version__} reads them, all equal")


if __name__ == "__main__":
    main(sys.argv[1])
