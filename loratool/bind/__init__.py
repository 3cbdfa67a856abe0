"""Binding: which tensors of a base each change of an adapter goes into (`bindings.bind`)."""
