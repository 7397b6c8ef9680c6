"""crates/lora-io/tests/golden/kohya_small.safetensors and .json: a LoRA file in kohya layout, and its hashes.

Four modules of Stable Diffusion 1.5 at rank 32 in float16, just large enough (over 1 MiB + 64 KiB) that the legacy hash
has bytes to hash. Values repeat, so that the file packs well. Serialised and hashed here from the definitions, with
nothing but the standard library and numpy; then read back through the safetensors library. The same bytes each time.

* sshs_model_hash, AutoV3: SHA-256 of everything behind the header (AutoV3: first 12 digits).
* sshs_legacy_hash: of the file as it would be with the `ss_*` metadata alone: SHA-256 of the 65536 bytes at offset
  1048576, first 8 digits. AutoV1: the same of the final file.
* AutoV2: SHA-256 of the final file, first 10 digits.
"""

import hashlib
import json
import struct
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parents[2] / "crates" / "lora-io" / "tests" / "golden"
RANK, ALPHA = 32, 16.0
MODULES = {  # name: shape of the base weight
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (3072, 768),
    "lora_unet_down_blocks_0_attentions_0_proj_in": (320, 320, 1, 1),
    "lora_unet_down_blocks_0_resnets_0_conv1": (320, 320, 3, 3),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj": (10240, 1280),
}
METADATA = {
    "ss_base_model_version": "sd_v1",
    "ss_network_alpha": "16.0",
    "ss_network_args": '{"conv_dim": "32", "conv_alpha": "16.0"}',
    "ss_network_dim": "32",
    "ss_network_module": "networks.lora",
    "ss_output_name": "kohya_small",
    "ss_tag_frequency": '{"10_caf\\u00e9": {"a \\"quoted\\" tag": 3}}',
    "ss_v2": "False",
}


def tensors():
    made = {}
    for place, (name, shape) in enumerate(MODULES.items()):
        down, up = (RANK, *shape[1:]), (shape[0], RANK, *(1 for _ in shape[2:]))
        for part, size, step in (("lora_down", down, 37), ("lora_up", up, 101)):
            pattern = (np.arange(np.prod(size)) * step + place) % 251 - 125
            made[f"{name}.{part}.weight"] = (pattern / 1024).astype(np.float16).reshape(size)
        made[f"{name}.alpha"] = np.array(ALPHA, dtype=np.float16)
    return dict(sorted(made.items()))  # one dtype: the format's writers order by name


def serialise(made, metadata):
    """Header and data of a safetensors file."""
    header, offset = {"__metadata__": metadata}, 0
    for name, values in made.items():
        header[name] = {"dtype": "F16", "shape": list(values.shape), "data_offsets": [offset, offset + values.nbytes]}
        offset += values.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, b"".join(values.tobytes() for values in made.values())


def legacy(content):
    return hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]


def main():
    made = tensors()
    header, data = serialise(made, METADATA)
    hashes = {"sshs_legacy_hash": legacy(header + data), "sshs_model_hash": hashlib.sha256(data).hexdigest()}
    header, data = serialise(made, METADATA | hashes)
    content = header + data
    assert len(content) >= 0x110000
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "kohya_small.safetensors"
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    expected = {
        **hashes,
        "auto_v1": legacy(content),
        "auto_v2": digest[:10],
        "auto_v3": hashes["sshs_model_hash"][:12],
        "sha256": digest,
        "modules": len(MODULES),
        "rank": RANK,
        "alpha": ALPHA,
        "metadata": METADATA | hashes,
    }
    (FOLDER / "kohya_small.json").write_text(json.dumps(expected, indent=2) + "\n")

    from safetensors import safe_open
    from safetensors.numpy import save

    with safe_open(path, framework="np") as file:
        assert file.metadata() == METADATA | hashes
        assert all((file.get_tensor(name) == values).all() for name, values in made.items())
        assert len(file.keys()) == len(made)
    theirs = save(made)
    assert theirs[8 + struct.unpack("<Q", theirs[:8])[0]:] == data, "the library orders tensors otherwise"
    print(f"{path.name}: {len(made)} tensors, {len(content)} bytes; {expected['auto_v1']} {expected['auto_v2']} {expected['auto_v3']}")


if __name__ == "__main__":
    main()
