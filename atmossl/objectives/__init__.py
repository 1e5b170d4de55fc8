"""What training optimises: objectives map (model, batch) to losses."""
