// Portable SIMD on the compilers' vector extensions: one source for SSE, AVX2, AVX-512 and NEON.
// Included by tiles.inl once for each instruction set, inside that set's namespace and target options.

template <typename T>
struct Bits;
template <>
struct Bits<float> {
  using Int = int32_t;
  typedef int8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));  // one for each lane
  typedef int8_t BytesAt __attribute__((vector_size(kVectorBytes / 4), aligned(1), may_alias));
  typedef double Wide __attribute__((vector_size(2 * kVectorBytes)));  // as many doubles
  typedef double WideAt __attribute__((vector_size(2 * kVectorBytes), aligned(8), may_alias));
};
template <>
struct Bits<double> {
  using Int = int64_t;
  typedef int8_t Bytes __attribute__((vector_size(kVectorBytes / 8)));
  typedef int8_t BytesAt __attribute__((vector_size(kVectorBytes / 8), aligned(1), may_alias));
  typedef double Wide __attribute__((vector_size(kVectorBytes)));
  typedef double WideAt __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};

template <typename T>
struct Simd {
  static constexpr int kLanes = kVectorBytes / sizeof(T);
  using Int = typename Bits<T>::Int;
  typedef T Vec __attribute__((vector_size(kVectorBytes)));
  typedef Int IntVec __attribute__((vector_size(kVectorBytes)));
  // The same vectors at any address.
  typedef T VecAt __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
  typedef Int IntVecAt __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));

  using Wide = typename Bits<T>::Wide;
  using WideAt = typename Bits<T>::WideAt;
  static inline Wide widen(Vec v) { return __builtin_convertvector(v, Wide); }
  static inline Wide load_wide(const double* p) { return *reinterpret_cast<const WideAt*>(p); }
  static inline void store_wide(double* p, Wide v) { *reinterpret_cast<WideAt*>(p) = v; }
  static inline void add_wide(double* p, Wide v) { store_wide(p, load_wide(p) + v); }
  static inline double sum_wide(Wide v) {
    double total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += v[lane];
    return total;
  }

  static inline Vec load(const T* p) { return *reinterpret_cast<const VecAt*>(p); }
  static inline void store(T* p, Vec v) { *reinterpret_cast<VecAt*>(p) = v; }
  static inline IntVec load_ids(const Int* p) { return *reinterpret_cast<const IntVecAt*>(p); }
  static inline Vec fill(T x) { return Vec{} + x; }
  static inline Vec select(IntVec mask, Vec yes, Vec no) { return mask ? yes : no; }
  static inline bool any(IntVec mask) {
    Int found = 0;
    for (int lane = 0; lane < kLanes; ++lane) found |= mask[lane];
    return found != 0;
  }

  static inline T sum(Vec v) {
    T total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += v[lane];
    return total;
  }
  static inline T max(Vec v) {
    T best = v[0];
    for (int lane = 1; lane < kLanes; ++lane) best = v[lane] > best ? v[lane] : best;
    return best;
  }
};

// 2^x for x <= 127 (float) or x <= 1023 (double); 0 below the normal range; NaN stays NaN.
// x = n + f with |f| <= 1/2: n becomes the exponent of a power of two, 2^f is a polynomial (minimax of degree
// 6, relative error 1e-7 with rounding, in float; the Taylor series of degree 13 in double). They are
// multiplied as numbers: whatever bits a NaN leaves in the power, it stays in the product.
template <typename T>
inline typename Simd<T>::Vec exp2_vec(typename Simd<T>::Vec x);

template <>
inline Simd<float>::Vec exp2_vec<float>(Simd<float>::Vec x) {
  using S = Simd<float>;
  // 1.5 * 2^23 and the bias of exponents: adding it rounds to an integer, held biased in the low bits.
  const S::Vec magic = S::fill(12582912.0f + 127);
  const S::Vec shifted = x + magic;
  const S::Vec f = x - (shifted - magic);
  S::Vec p = S::fill(kExp2Float[6]);
  for (int i = 5; i >= 0; --i) p = p * f + kExp2Float[i];
  const S::Vec power = (S::Vec)((S::IntVec)shifted << 23);
  return S::select(x < -126.0f, S::Vec{}, p * power);
}

template <>
inline Simd<double>::Vec exp2_vec<double>(Simd<double>::Vec x) {
  using S = Simd<double>;
  const S::Vec magic = S::fill(6755399441055744.0 + 1023);  // 1.5 * 2^52 and the bias
  const S::Vec shifted = x + magic;
  const S::Vec f = x - (shifted - magic);
  S::Vec p = S::fill(kExp2Double[13]);
  for (int i = 12; i >= 0; --i) p = p * f + kExp2Double[i];
  const S::Vec power = (S::Vec)((S::IntVec)shifted << 52);
  return S::select(x < -1022.0, S::Vec{}, p * power);
}
