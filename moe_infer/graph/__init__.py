"""ONNX graphs: finding MoE blocks, putting MoELayer nodes in their place, lowering these again.

The rewriter reads in this order: ``rewrite`` (entry), ``families`` (what is found), ``interpreter``
and ``expression`` (graph to layout-free expressions), ``patterns`` (what a MoE layer looks like as
an expression), ``replace`` (the graph's surgery), ``experts_file`` and ``save`` (what is written),
``report``. ``match``, ``shapes`` and ``external`` are what they share.
"""
