"""Any pytree of arrays and a JAX function as a backend."""
