/* Hides the differences between gcc and clang. */

#ifndef LAMINA_COMPILER_H
#define LAMINA_COMPILER_H

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))

/* Code between BEGIN_TARGET and END_TARGET is compiled for CPUs with the features, a string such as "avx2,fma". */
#define LAMINA_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#define BEGIN_TARGET(features) LAMINA_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET LAMINA_PRAGMA(clang attribute pop)
#else
#define UNROLL _Pragma("GCC unroll 16")
#define BEGIN_TARGET(features) LAMINA_PRAGMA(GCC push_options) LAMINA_PRAGMA(GCC target(features))
#define END_TARGET LAMINA_PRAGMA(GCC pop_options)
#endif

#endif
