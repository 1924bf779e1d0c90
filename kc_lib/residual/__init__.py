"""Who writes to and who reads from the residual stream: the only place that knows architectures.

A pre-norm decoder is a stream to which the embedding, every attention head and every MLP add their outputs, and from
which the queries, keys and values of every head, every MLP and the logits read through a norm. ``decoder_of`` takes a
``TransformerBridge`` apart into exactly that: per-head weights, norms whose vector-Jacobian product is known in closed
form, the model's own MLP modules, and what attention does between queries and head outputs. The kernels compute with
these parts and never look at the model again. Where a method changes the backward pass (``backward_rules.py``) or scores
neurons, MLPs and norms on queries and keys are needed in parts too; a model where these are not known is refused there only.

Covered: learned, rotary (full, partial, half-split or adjacent pairs) or no positions; grouped queries; biases; norms
on queries and keys per head; sliding windows; soft-capped scores and logits; parallel attention and MLP (NeoX, GPT-J,
Phi), with one norm or two; norms on outputs (Gemma-2/3), where a head's contribution is its output times the norm's
scale in that same run, so that contributions still sum to the stream. Masked language models of the BERT kind renormalise
the stream itself after every block, so no sum of writers equals it: ``decoder_of`` refuses them, and ``encoder_of`` takes
them apart as far as methods about MLP neurons need (``encoder.py``).

``decoder_of`` ends by comparing its own logits with the model's on random tokens. A part of an architecture that is not
known here therefore shows as an error on load, never as a wrong number later.
"""
