"""The layer-wise stage (eq. 7): closed form, Adam, weighted."""
