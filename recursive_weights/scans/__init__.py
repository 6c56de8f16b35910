"""Recursion over time: a state that every token changes and every token reads.

`linear_attention` (gated linear attention, RWKV-6), `ssd` (Mamba-2),
`delta_rule` (gated delta rule, Kimi Delta Attention) and `selective` (Mamba-1)
hold one recurrence each, in four forms with one meaning:

  scan     a sequence from any state; `algorithm` is 'chunked' (matrix products
           over chunks of tokens, for training), 'recurrent' (token by token,
           the plain reference), 'fused' (GPU kernels, see `kernels`), or
           'auto', which chooses: 'fused' on one GPU where it can be, matrix
           states only in bfloat16
  prefill  as `scan`, and keeps what `commit` needs
  commit   the state after any number of a prefill's tokens, without a rerun
  step     one token, for decoding

Arguments that all of them share:

  state    float32, the batch first; None starts from `fresh`
  fresh    the state at the start of a text, with or without the batch axis;
           None for zeros. A learned initial state gets its gradient here.
  resets   bool [B, T], True at the first token of a text: the state before it
           is `fresh`, whatever came earlier. Texts packed in one row are
           exactly their separate runs.
  mask     bool [B, T], False at tokens that are not there: they leave the
           state as it is, their outputs and gradients are zero.

`decay` holds what keeps the chunked forms exact for every gate.
"""
