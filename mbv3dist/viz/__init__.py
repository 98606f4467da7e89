"""Pictures for people: boxes on photographs, contact sheets, training curves."""
