# mypy: ignore-errors
# ruff: noqa: UP018, RUF046
"""Ray casting and shading, as warp kernels: warp compiles them, so they are restricted Python."""

import warp as wp

from passreid_synth3d.surfaces import Pattern, Region, Surface, is_present, noise, tint

__all__ = ["Light", "Scene", "View", "face_normals", "picture"]

FAR = wp.constant(200.0)  # metres


@wp.struct
class Scene:
    """Meshes: persons, surroundings in view (for rays from the eye), all surroundings (for rays to the sun)."""

    ids: wp.array(dtype=wp.uint64)
    starts: wp.array(dtype=int)  # the first face of each mesh
    corners: wp.array(dtype=int)  # vertices of faces, 3 each
    materials: wp.array(dtype=int)  # of faces
    regions: wp.array(dtype=int)
    uvs: wp.array(dtype=wp.vec2)  # of corners
    ats: wp.array(dtype=wp.vec3)
    normals: wp.array(dtype=wp.vec3)  # of vertices
    surfaces: wp.array(dtype=Surface)
    logos: wp.array3d(dtype=float)
    feet: wp.array(dtype=wp.vec3)


@wp.struct
class Light:
    sun: wp.vec3  # direction to it
    sunlight: wp.vec3
    sky: wp.vec3  # ambient light from above
    ground: wp.vec3  # ambient light from below
    horizon: wp.vec3  # radiance of the sky at the horizon
    zenith: wp.vec3  # radiance of the sky above
    shadow: float  # share of the sunlight that is missing in a shadow


@wp.struct
class View:
    eye: wp.vec3
    right: wp.vec3
    down: wp.vec3
    forward: wp.vec3
    left: float  # left and top edge of the crop, in units of the focal length
    top: float
    step: float  # of a pixel


@wp.struct
class Hit:
    valid: int  # 1, or 0 for the sky
    distance: float
    material: int
    region: int
    normal: wp.vec3
    uv: wp.vec2
    at: wp.vec3


@wp.func
def cast(scene: Scene, origin: wp.vec3, direction: wp.vec3) -> Hit:
    """First surface along a ray from the eye that is not cut away there."""
    best = Hit()
    best.valid = 0
    best.material = -1
    best.distance = FAR
    for i in range(scene.ids.shape[0] - 1):
        begin = float(0.0)
        for _layer in range(12):
            q = wp.mesh_query_ray(scene.ids[i], origin + direction * begin, direction, best.distance - begin)
            if not q.result:
                break
            begin += q.t
            face = scene.starts[i] + q.face
            region = scene.regions[face]
            a = 3 * face
            w = 1.0 - q.u - q.v
            uv = scene.uvs[a] * q.u + scene.uvs[a + 1] * q.v + scene.uvs[a + 2] * w
            at = scene.ats[a] * q.u + scene.ats[a + 1] * q.v + scene.ats[a + 2] * w
            if is_present(scene.surfaces[scene.materials[face]], region, uv, at):
                best.valid = 1
                best.distance = begin
                best.material = scene.materials[face]
                best.region = region
                best.uv = uv
                best.at = at
                n = q.normal
                if region != Region.THING:
                    n = (
                        scene.normals[scene.corners[a]] * q.u
                        + scene.normals[scene.corners[a + 1]] * q.v
                        + scene.normals[scene.corners[a + 2]] * w
                    )
                n = wp.normalize(n)
                if wp.dot(n, direction) > 0.0:
                    n = -n
                best.normal = n
                break
            begin += 1.0e-4
    return best


@wp.func
def in_shadow(scene: Scene, origin: wp.vec3, sun: wp.vec3) -> bool:
    """Whether a surface lies between a point and the sun."""
    for i in range(scene.ids.shape[0]):
        if i == scene.ids.shape[0] - 2:
            continue
        begin = float(0.0)
        for _layer in range(6):
            q = wp.mesh_query_ray(scene.ids[i], origin + sun * begin, sun, 60.0)
            if not q.result:
                break
            face = scene.starts[i] + q.face
            m = scene.surfaces[scene.materials[face]]
            if scene.regions[face] == Region.THING and m.pattern != Pattern.FOLIAGE:
                return True
            begin += q.t
            a = 3 * face
            w = 1.0 - q.u - q.v
            uv = scene.uvs[a] * q.u + scene.uvs[a + 1] * q.v + scene.uvs[a + 2] * w
            at = scene.ats[a] * q.u + scene.ats[a + 1] * q.v + scene.ats[a + 2] * w
            if is_present(m, scene.regions[face], uv, at):
                return True
            begin += 1.0e-4
    return False


@wp.func
def reflected(scene: Scene, light: Light, hit: Hit, place: wp.vec3, direction: wp.vec3, sunny: float) -> wp.vec3:
    """Radiance of a surface that receives the share `sunny` of the sunlight."""
    m = scene.surfaces[hit.material]
    n = hit.normal
    if m.bump > 0.0:  # folds depend on uv, so they move with the cloth
        a = noise(hit.uv[0] / 0.045, hit.uv[1] / 0.12, m.seed)
        b = noise(hit.uv[0] / 0.05 + 9.1, hit.uv[1] / 0.1, m.seed + 5.0)
        n = wp.normalize(n + m.bump * wp.vec3(a, b, a - b))
    facing = wp.max(0.0, wp.dot(n, light.sun)) * sunny
    up = 0.5 + 0.5 * n[2]
    around = light.sky * up + light.ground * (1.0 - up)
    if hit.region == Region.THING and place[2] < 0.05:  # feet darken the ground
        for i in range(scene.feet.shape[0]):
            d = place - scene.feet[i]
            around = around * (1.0 - 0.55 * wp.exp(-(d[0] * d[0] + d[1] * d[1]) / 0.03))
    colour = wp.cw_mul(tint(m, hit.region, hit.uv, hit.at, scene.logos), around + light.sunlight * facing)
    if m.shine > 0.0:
        half = wp.normalize(light.sun - direction)
        gloss = wp.pow(wp.max(0.0, wp.dot(n, half)), 24.0) * m.shine
        colour += light.sunlight * gloss * wp.min(1.0, facing * 4.0) + light.sky * m.shine * 0.1
    return colour


@wp.kernel
def picture(scene: Scene, view: View, light: Light, image: wp.array2d(dtype=wp.vec3)):
    """Radiance of each pixel: the mean of two rays, or of four if the first two differ."""
    row, column = wp.tid()
    total = wp.vec3(0.0, 0.0, 0.0)
    first = wp.vec3(0.0, 0.0, 0.0)
    material = int(-2)
    sunny = float(1.0)
    count = int(0)
    for s in range(4):
        x = 0.25 + 0.5 * float(s % 2)
        y = 0.25 + 0.5 * float((s + s / 2) % 2)
        direction = wp.normalize(
            view.forward
            + view.right * (view.left + (float(column) + x) * view.step)
            + view.down * (view.top + (float(row) + y) * view.step)
        )
        hit = cast(scene, view.eye, direction)
        same = hit.material == material
        colour = wp.vec3(0.0, 0.0, 0.0)
        if hit.valid == 0:
            a = wp.clamp(3.0 * direction[2], 0.0, 1.0)
            colour = light.horizon * (1.0 - a) + light.zenith * a
        else:
            place = view.eye + direction * hit.distance
            if light.shadow > 0.0 and (s % 2 == 0 or not same):  # a pair of rays to one material shares its shadow
                sunny = 1.0
                if wp.dot(hit.normal, light.sun) > -0.2 and in_shadow(scene, place + hit.normal * 0.012, light.sun):
                    sunny = 1.0 - light.shadow
            colour = reflected(scene, light, hit, place, direction, sunny)
        material = hit.material
        total += colour
        count += 1
        if s == 0:
            first = colour
        if s == 1 and same and wp.length(colour - first) < 0.06 * (0.1 + wp.length(colour + first)):
            break
    image[row, column] = total / float(count)


@wp.kernel
def face_normals(points: wp.array(dtype=wp.vec3), corners: wp.array(dtype=int), normals: wp.array(dtype=wp.vec3)):
    """Add each face's normal, weighted by its area, to the normals of its corners."""
    f = wp.tid()
    a = corners[3 * f]
    b = corners[3 * f + 1]
    c = corners[3 * f + 2]
    n = wp.cross(points[b] - points[a], points[c] - points[a])
    wp.atomic_add(normals, a, n)
    wp.atomic_add(normals, b, n)
    wp.atomic_add(normals, c, n)
