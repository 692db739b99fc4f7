"""Write `vectors.json` anew: `python -m tests.watermark.make_vectors`, after a change of a format and of its version.

What others published – RFC 6962's trees, RFC 8032's signatures – stays as it is; all else is computed by the code
itself, so that the file shows a change and proves nothing: `test_commitments` computes a commitment by hand.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

from watermark import commitments, derive
from watermark.keys import VK, keygen

FILE = Path(__file__).parent / "vectors.json"
SEED = bytes(range(32))


def main() -> None:
    """Compute and write."""
    vectors = json.loads(FILE.read_text())
    label, truth = 3, 5
    payloads = {
        "label": commitments.label_payload(label),
        "trigger": commitments.trigger_payload(bytes(range(12)), (3, 2, 2), truth),
    }
    vectors["commitment"] = {
        "r": SEED.hex(),
        "key_id": (b"k" * 32).hex(),
        "index": 7,
        "label": label,
        "truth": truth,
        "pixels": bytes(range(12)).hex(),
        "shape": [3, 2, 2],
        "values": {role: commitments.commit(SEED, b"k" * 32, 7, role, payloads[role]).hex() for role in payloads},  # type: ignore[arg-type]
    }
    vectors["derive"] = {
        "seed": SEED.hex(),
        "abstract": hashlib.sha256(derive.abstract(SEED, 5, (3, 12, 10)).tobytes()).hexdigest(),
        "noise": hashlib.sha256(derive.noise(SEED, 5, (3, 12, 10)).tobytes()).hexdigest(),
        "labels": derive.labels(SEED, [-1] * 5 + [0, 4, 9], 10),
        "nonces": [nonce.hex() for nonce in derive.nonces(SEED, 1)],
        "order": derive.order(SEED, 20),
    }
    with tempfile.TemporaryDirectory() as folder:
        keygen(Path(folder) / "key", classes=10, shape=(1, 8, 8), n=6, seed=SEED)
        vectors["vk"] = (Path(folder) / "key" / VK).read_text()
    FILE.write_text(json.dumps(vectors, indent=1) + "\n")


if __name__ == "__main__":
    main()
