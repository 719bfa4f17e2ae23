"""mergekit's formats: recipes in (schema, plan, execute), recipes out (write), and mergekit-evolve's configs."""
