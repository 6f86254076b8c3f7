"""Floating-point operations that a model needs, by formula."""


def decoder_flops_per_token(
    n_parameters: int, n_layers: int, d_model: int, context_length: int, n_frozen: int = 0
) -> int:
    """Operations of a transformer's forward and backward pass for one token: 6·N + 4·F + 12·L·D·T.

    Two for each multiplication and addition, forward once and backward twice. What is computed again (activation
    checkpointing, a loss in chunks) does not count. Attention counts whole, although a causal mask makes half of it
    needless: so do the figures that others publish.

    Args:
        n_parameters: N, of the matrices by which each token is multiplied; embeddings that are looked up are not, a
            token embedding that is the output layer too is.
        n_layers: L.
        d_model: D, heads times their width.
        context_length: T, tokens in a sequence.
        n_frozen: F, of matrices that are not trained: their own gradient is not computed. PaLM's formula is F = 0.

    Source: A. Chowdhery et al., 'PaLM: Scaling Language Modeling with Pathways', 2022, appendix B.
    """
    return 6 * n_parameters + 4 * n_frozen + 12 * n_layers * d_model * context_length
