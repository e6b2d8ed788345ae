"""Makes the built-in sample: the first images of each class of Fashion-MNIST, in file order.

    python sample/make_sample.py FOLDER_WITH_THE_FOUR_IDX_FILES

Reads the official files and writes four gzipped idx files to the folder of this script. Every run
writes the same bytes.
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from datasets import FashionMNIST, read_idx, write_idx  # noqa: E402
from trainer.exit_status import exit_status  # noqa: E402

PER_CLASS = {"train": 600, "t10k": 200}


def main(source: Path) -> int:
    for prefix, count in PER_CLASS.items():
        images_name = f"{prefix}-images-idx3-ubyte"
        labels_name = f"{prefix}-labels-idx1-ubyte"
        images = read_idx(source, images_name, ndim=3)
        labels = read_idx(source, labels_name, ndim=1)

        classes = range(FashionMNIST.num_classes)
        first = [np.flatnonzero(labels == label)[:count] for label in classes]
        chosen = np.sort(np.concatenate(first))

        for name, array in ((images_name, images[chosen]), (labels_name, labels[chosen])):
            path = HERE / f"{name}.gz"
            write_idx(path, array)
            print(f"{path.name}: {array.shape}, {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(exit_status(lambda: main(Path(sys.argv[1]))))
