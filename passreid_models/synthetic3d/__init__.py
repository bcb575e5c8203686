"""Synthetic pedestrians in 3-D: persons with clothes, walking through places, as surveillance cameras see them.

Needs the extra ``[synth3d]``: anny's parametric body and warp, which casts the rays on the CPU.

    wardrobe, fabrics, prints   who someone is: phenotype, clothes, hair, bags, by (seed, pid)
    body, pose                  anny's body; how it moves
    layers, accessories, figure clothes hung on the body; what is worn or carried; all of it as triangles
    place, light                where a camera hangs and what it sees, by (seed, camid)
    mesh, surfaces, kernel      triangles and materials; what surfaces look like; rays and light
    render, sensor, picture     radiance; what the camera makes of it; one image, by (seed, pid, camid, k)
    dataset                     a dataset in the layout of Market-1501, on all cores

`draw` and `write_market1501` import anny and warp, at their first call alone.
"""
