"""Image files: formats that are meant, pixels of more than 8 bits, files that never end."""

import gzip
import io
import os
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import INaturalist, load_image, read_idx
from models import build_model, cut_pixels
from utils import BadImageError, UserError

RAMP = np.linspace(0, 1, 256)[None].repeat(4, 0)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n"


def ramp(scale, kind, low=0.0):
    return (low + RAMP * (scale - low)).astype(kind)


@pytest.mark.parametrize(
    "pixels, name",
    [
        (ramp(65535, np.uint16), "a.png"),
        (ramp(65535, np.uint16), "a.tif"),
        (ramp(65535, np.int32), "a.tif"),
        (ramp(2**31 - 1, np.int32), "a.tif"),
        (ramp(2**31 - 1, np.int32, low=-(2**31)), "a.tif"),
        (ramp(255, np.int32), "a.tif"),
        (ramp(1, np.float32), "a.tif"),
        (ramp(255, np.float32), "a.tif"),
        (ramp(1e6, np.float32), "a.tif"),
        (ramp(1, np.float32, low=-1), "a.tif"),
    ],
)
def test_pixels_of_more_than_8_bits_are_scaled(tmp_path, pixels, name):
    Image.fromarray(pixels).save(tmp_path / name)
    image = load_image(tmp_path / name)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - np.arange(256)[None, :, None]).max() <= 1


def test_16_bits_of_a_pgm_are_scaled(tmp_path):
    pixels = ramp(65535, np.uint16)
    header = b"P5 256 4 65535\n"
    (tmp_path / "a.pgm").write_bytes(header + pixels.astype(">u2").tobytes())
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.pgm"))[0, :, 0], np.arange(256))


def test_a_dark_image_of_16_bits_stays_dark(tmp_path):
    Image.fromarray(ramp(2570, np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(load_image(tmp_path / "a.png")).max() == 10


def test_floats_that_are_not_finite_are_named(tmp_path):
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(BadImageError, match=r"a.tif: .*not finite"):
        load_image(tmp_path / "a.tif")


@pytest.mark.parametrize("name", ["a.JPEG", "a.png", "a.tif"])
def test_a_postscript_file_runs_no_ghostscript_whatever_its_name(tmp_path, monkeypatch, name):
    def refuse(*args, **options):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "check_call", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    (tmp_path / name).write_bytes(EPS)
    with pytest.raises(BadImageError, match="in no known format"):
        load_image(tmp_path / name)


def test_pillow_itself_opens_no_other_format():
    with pytest.raises(Image.UnidentifiedImageError):  # as torchvision and timm would
        Image.open(io.BytesIO(EPS))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_the_formats_that_are_meant_are_read(tmp_path, kind):
    Image.new("RGB", (8, 6), (200, 200, 200)).save(tmp_path / "a.jpg", kind)
    image = load_image(tmp_path / "a.jpg")
    assert (image.size, image.mode) == ((8, 6), "RGB")


def test_a_pipe_or_a_device_is_refused_instead_of_read(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("/dev/zero")
    for name in ("a.png", "b.png"):
        with pytest.raises(BadImageError, match="a pipe or a device"):
            load_image(tmp_path / name)
    os.mkfifo(tmp_path / "train-images-idx3-ubyte")
    with pytest.raises(UserError, match="a pipe or a device"):
        read_idx(tmp_path, "train-images-idx3-ubyte", 3)
    os.mkfifo(tmp_path / "categories.json")
    with pytest.raises(UserError, match="a pipe or a device"):
        INaturalist(tmp_path, 2018, is_train=True)


def test_a_file_of_more_bytes_than_an_image_has_is_refused(tmp_path):
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(2**40)  # takes no place on the disk
    with pytest.raises(BadImageError, match="expected at most"):
        load_image(tmp_path / "a.png")


def test_a_gzip_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.idx_files.LARGEST", 2**20)
    (tmp_path / "x.gz").write_bytes(gzip.compress(bytes(2**22)))
    with pytest.raises(UserError, match="unpacks to more than"):
        read_idx(tmp_path, "x", 3)


def test_what_patches_cut_off_is_said():
    shape = ["patch_size=16", "depth=1", "embed_dim=8", "num_heads=1"]
    model = build_model("vit_tiny_patch16_224", 2, 38, assignments=shape)
    line = cut_pixels(model, 38)
    assert "patches of 16 pixels cover 32; the last 6 pixels" in line

    # The line is true
    images = torch.rand(1, 3, 38, 38)
    cut = images.clone()
    cut[..., 32:] = 0
    cut[..., 32:, :] = 0
    assert torch.equal(model.eval()(images), model(cut))

    exact = build_model("vit_tiny_patch16_224", 2, 32, assignments=shape)
    assert cut_pixels(exact, 32) == ""
