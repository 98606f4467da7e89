"""What `mbv3dist export` can write; without torch, so that --help is fast."""

EXPORT_FORMATS = ("onnx", "torch-export", "torchvision", "timm")
# Endings of the file -> format. Weights in a library's own names need --format: either library
# reads either ending.
FORMAT_BY_ENDING = {".onnx": "onnx", ".pt2": "torch-export"}
ENDINGS = {
    "onnx": (".onnx",),
    "torch-export": (".pt2",),
    "torchvision": (".pth", ".pt", ".safetensors"),
    "timm": (".pth", ".pt", ".safetensors"),
}
