"""Where a model's files are, and whether its parts are all there: checked without torch and transformers."""

from __future__ import annotations

from pathlib import Path

from stillknows.errors import UserError
from stillknows.model import limits
from stillknows.model.limits import CONFIG
from stillknows.model.modelfiles import WEIGHTS, ModelFiles, require_no_adapter


def folder_of(name: str, allow_pickle: bool) -> Path:
    """Return the folder of a local model, or of one that is downloaded from the hub; UserError where there is none."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise UserError(f"no folder {name}", "give a folder with a Hugging Face model, or a hub name like org/model")
    return _download(name, allow_pickle)


def _download(name: str, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    unwanted = ["*.gguf", "*.h5", "*.msgpack", "*.onnx"] + ([] if allow_pickle else ["*.bin", "*.pt", "*.pth"])
    try:
        return Path(snapshot_download(name, ignore_patterns=unwanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name} is neither a folder here nor a model that the hub gives: {str(error).splitlines()[0]}",
            "check the spelling, the network, and `hf auth login` for a gated model",
        ) from error


def local_folders(*names: str) -> list[Path]:
    """Return the folders on this machine that models of these names lie in; hub names have none."""
    paths = [Path(name).expanduser() for name in names]
    return [path.parent if path.is_file() else path for path in paths if path.exists()]


def readable_files(folder: Path, trust_remote_code: bool) -> ModelFiles:
    """Return a folder's files, once what its JSON files say is checked.

    Raises UserError: an adapter, no config.json, files that cannot be read, more layers than weights, and Python code
    of its own without `trust_remote_code`: running another class in its place could give other numbers.
    """
    require_no_adapter(folder)
    files = ModelFiles(folder, limits.require_readable(folder))
    if files.code_asked_by and not trust_remote_code:
        raise UserError(
            f"{files.code_asked_by} asks for Python code that comes with the model (auto_map)",
            "read that code; then add `trust_remote_code` to run it",
        )
    limits.require_layers(files.said(CONFIG), files.weights, f"{folder}/{CONFIG}")
    if not isinstance(files.said(CONFIG).get("quantization_config") or {}, dict):
        raise UserError(f"{folder}/{CONFIG}: its quantization_config is no JSON object", limits.AGAIN)
    return files


def require_weights(files: ModelFiles, allow_pickle: bool) -> None:
    """Raise UserError for a folder without weights, for pickled ones that are not allowed, and for weight files that
    are missing or damaged."""
    folder = files.path
    if not files.weights:
        raise UserError(f"{folder} has no weights ({WEIGHTS[0]})", "give the folder of a saved model")
    if files.pickled and not allow_pickle:
        raise UserError(
            f"{folder} has only pickled weights ({files.pickled[0].name}), and a pickle can run code",
            "convert it to safetensors, or add `allow_pickle` if you trust where it comes from",
        )
    for file in files.weights:
        if not file.is_file():
            raise UserError(f"{folder} lacks {file.name}, which its index or config names", "copy or download it again")
        limits.count_tensors(file)
