"""SHA-256 digests of noise-v1: the frozen contract as numbers.

A digest is over the little-endian float32 bytes of the first n normals. The first five differ in one word each, so that
two counter words that were swapped, or one that was dropped, show.
"""

from __future__ import annotations

# (seed, sample_id, step, stream, n) -> digest
NOISE_V1: dict[tuple[int, int, int, int, int], str] = {
    (0, 0, 0, 0, 1024): "81862b937e62a01675a8920b2af25a5b00473e81bf2de5512b98394a08727df6",
    (1, 0, 0, 0, 1024): "86c12fd59f98b9955d824e9704fee1416ec1f19104ad4ec2b83e28c5cf9df23f",
    (0, 1, 0, 0, 1024): "5301e37679d38f58f0be963baf1116e391de52ee9f0ccee906f2b311f65bf027",
    (0, 0, 1, 0, 1024): "ead9e2b68e2d6c900bf3b5fcd860f90ebd3fc49e6d8983805029817b8482b8e7",
    (0, 0, 0, 1, 1024): "74e99d6a58060a178250445691def56b03d81c49288a8cbd043f6f9382d3c2b8",
    (2**63 - 1, 2**32 - 1, 999, 4, 1027): "c5764909298eeddfe3bed3d70a7f1c2f5355b04541f3de11866e2dec40206d18",
    (2**64 - 1, 7, 12345, 2, 12288): "7209b48bada2c433672eefac4cd8163f19d08df7c97233742a6848182bb8976f",
    (0, 0, 0, 0, 4096): "91a9b6c58a665f80153d0e087d57f9d8503f5d1116aba9f5f48a06190ada49e9",
    (1, 2, 3, 1, 4096): "9d6763253da9a66c70937c18503e5ef9cc1a068ab7bbfe258b31e0a621821a81",
    (2**63, 2**32 - 1, 2**31, 4, 1001): "9b0acb44d9df19704f9702bb887ac0034f1f1ae65ce671c3af9624b044d253fb",
    (2**64 - 1, 7, 999, 2, 65536): "c07335cff1c4aab11fea363e802dc922029b6997781487ee8288382009bc4974",
}
