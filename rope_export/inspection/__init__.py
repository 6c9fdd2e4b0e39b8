"""What any ONNX file will do with positions and attention, read from its graph without running it.

`report` puts together what the others find: `files` reads, `values` follows constants,
`angle_sources` and `rope_patterns` find rotations, `attention_patterns` finds attention. PyTorch
and onnxruntime are not needed.
"""
