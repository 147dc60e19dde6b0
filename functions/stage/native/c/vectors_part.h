/* Parts of vectors, for levels without masked loads and stores. It needs `vec`, `load` and `store`. */

INLINE vec load_part(const float *at, int64_t count)
{
    float lanes[16] = {0};
    for (int64_t i = 0; i < count; i++)
        lanes[i] = at[i];
    return load(lanes);
}
INLINE void store_part(float *at, vec a, int64_t count)
{
    float lanes[16];
    store(lanes, a);
    for (int64_t i = 0; i < count; i++)
        at[i] = lanes[i];
}
