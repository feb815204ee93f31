"""The spectral split of one operand, as algebra: project, subtract, sketch, orthonormalise.

`projector` splits a tensor by a given basis, `basis` decides when and how that basis is renewed,
`orthonormal` makes its columns orthonormal. Nothing here knows of FP4, of layers, or of process groups: a
caller whose tensors are sharded exchanges partial sums between two calls and gets the bits that a single rank
would have got.
"""
