"""A sampler is a table: one builder for each sampler, a pure function from a schedule to rows."""
