"""Pictures made from people: poses drawn, faces cut out, masks, backgrounds, previews."""
