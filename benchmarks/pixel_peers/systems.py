"""Which loaders are measured, what each needs, and what it delivers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """A pipeline that delivers batches.

    Attributes:
        title: Its name in tables.
        module: Its file in this folder.
        needs: Modules that its interpreter has to have; none for ours.
        settings: What was set, and what it reads.
        jpeg: Whether it reads the pictures' own JPEG bytes.
    """

    title: str
    module: str
    needs: tuple[str, ...]
    settings: str
    jpeg: bool = True


OURS = "ours"
CHECKED = "ours_checked"
DELAYED = "ours_delayed"

CLASSIFICATION = {
    OURS: System(
        "mbv3dist",
        "ours_peer",
        (),
        "shards by `mbv3dist convert imagefolder`, Loader, num_threads 2, prefetch 3, from the "
        "run's second epoch on",
    ),
    CHECKED: System(
        "mbv3dist, a checksum at each read",
        "ours_peer",
        (),
        "the same with verify='always', as every run's first epoch is",
    ),
    "torchvision_pil": System(
        "torchvision ImageFolder, PIL, v1",
        "torchvision_peer",
        ("torch", "torchvision", "PIL"),
        "DataLoader with 2 workers; RandomResizedCrop, RandomHorizontalFlip, ToTensor, Normalize",
    ),
    "torchvision_v2": System(
        "torchvision v2 on tensors",
        "torchvision_peer",
        ("torch", "torchvision", "PIL"),
        "DataLoader with 2 workers; decode_image, v2.RandomResizedCrop(antialias=True), flip",
    ),
    "timm": System(
        "timm create_loader",
        "timm_peer",
        ("torch", "timm"),
        "ImageFolder, 2 workers, prefetcher on the CPU (it normalises), colour_jitter 0, bilinear",
    ),
    "webdataset_pil": System(
        "webdataset, decode('pil')",
        "webdataset_peer",
        ("torch", "torchvision", "webdataset"),
        "tars by ShardWriter, shuffle(1000), v1 transform, batched in 2 workers, WebLoader",
    ),
    "webdataset_uint8": System(
        "webdataset, torchvision's decoder",
        "webdataset_peer",
        ("torch", "torchvision", "webdataset"),
        "the same tars, decode_jpeg and v2 transforms on tensors",
    ),
    "mosaicml": System(
        "MosaicML Streaming",
        "mosaicml_peer",
        ("torch", "torchvision", "streaming"),
        "MDS with the files' bytes, StreamingVisionDataset (PIL), v1 transform, "
        "StreamingDataLoader with 2 workers",
    ),
    "litdata": System(
        "LitData",
        "litdata_peer",
        ("torch", "torchvision", "litdata"),
        "chunks with the files' bytes, its JPEG serializer, v2 transforms on tensors, "
        "StreamingDataLoader with 2 workers",
    ),
    "ffcv": System(
        "FFCV, JPEG mode",
        "ffcv_peer",
        ("torch", "ffcv", "cv2"),
        "a .beton that it encodes itself at quality 95, num_workers 2, OrderOption.RANDOM, "
        "RandomResizedCropRGBImageDecoder (area interpolation)",
    ),
    "dali": System(
        "DALI on the CPU",
        "dali_peer",
        ("torch", "nvidia.dali"),
        "class folder, num_threads 2, image_random_crop, resize (linear, antialias), flip",
    ),
}

DETECTION = {
    OURS: System(
        "mbv3dist",
        "ours_peer",
        (),
        "shards by `mbv3dist convert voc`, Loader, num_threads 2, view ssd with torchvision's "
        "minimum IoUs (0, .1, .3, .5, .7, .9) and its probability of no crop (1/7)",
    ),
    CHECKED: System(
        "mbv3dist, a checksum at each read", "ours_peer", (), "the same with verify='always'"
    ),
    "detection_pil": System(
        "torchvision v2, PIL",
        "torchvision_peer",
        ("torch", "torchvision", "PIL"),
        "DataLoader with 2 workers; RandomZoomOut, RandomIoUCrop, RandomHorizontalFlip, "
        "Resize(320), to float32, SanitizeBoundingBoxes",
    ),
    "detection_v2": System(
        "torchvision v2, uint8 tensors",
        "torchvision_peer",
        ("torch", "torchvision", "PIL"),
        "the same transforms on tensors",
    ),
}

QUICK = (OURS, DELAYED, "torchvision_pil", "detection_pil")
DELAYED_SYSTEM = System(
    "mbv3dist, delayed", "ours_peer", (), "ours with a pause at each batch: has to be seen"
)
