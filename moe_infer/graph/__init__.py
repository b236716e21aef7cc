"""ONNX graphs: finding MoE blocks, putting MoELayer nodes in their place, lowering these again.

The rewriter reads in this order: ``rewrite`` (entry; ``explain`` is the same without writing),
``candidates``, ``families`` and ``search`` (what is found), ``interpreter``, ``routing`` and
``expression`` (graph to layout-free expressions), ``apart`` and ``rows`` (experts that nodes of
their own compute), ``patterns`` with ``router_patterns``, ``expert_patterns`` and ``activations``
(what a MoE layer looks like as an expression), ``replace`` (the graph's surgery),
``experts_file`` and ``save`` (what is written), ``report``. ``match``, ``mismatch``, ``shapes``,
``shape_values`` and ``external`` are what they share.
"""
