"""The loaders and decoders that `loader.py` and `decode.py` measure, each in a process of its own.

`systems.py` says which there are. A loader's module has

- `versions()`: what ran;
- `prepare(folder, out)`: pack the class folder (or VOC folder) in its own format;
- `open_loader(name, job)`: return what starts an epoch: a function without arguments that returns
  an iterator of (images, labels), where labels are a tensor or array with one number a sample.

It runs in the peers' interpreter and must not import mbv3dist; `ours_peer.py` runs in ours.
"""
