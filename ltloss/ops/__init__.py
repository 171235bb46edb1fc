"""One file per operator: schema, fake, gradient and the choice of the backend side by side."""
