"""Text generation on a decoder graph: ``cache`` runs the graph, ``sampling`` chooses tokens."""
