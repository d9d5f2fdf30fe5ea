"""`caprese playground`: a page on which the full model and Caprese answer side by side, from one server."""
