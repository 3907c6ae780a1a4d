// What kernels of all kinds share: short names, kernels that begin before the one before them ends, barriers in shared memory,
// and what the blocks of a cluster tell each other.
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

#define DEVICE __device__ __forceinline__

DEVICE u32 smem_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// The kernel before this one in the stream has finished and its results are visible (nothing to wait for in a plain launch).
DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may be started: what it does before its own wait overlaps with us.
DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Barriers in shared memory, by their addresses.
DEVICE void barrier_init(u32 barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
DEVICE void barrier_arrive(u32 barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
}
#if __CUDA_ARCH__ >= 900
// It also waits for so many bytes that are copied or sent to this block.
DEVICE void barrier_arrive_expecting(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
#endif
DEVICE void barrier_wait(u32 barrier, u32 parity) {
  u32 done;
  do
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
#else
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
#endif
                 : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  while (!done);
}

// ---- Clusters ----
//
// Each block has an inbox: a barrier, and slots of 8 or 16 bytes that others write. Words are sent asynchronously and counted by the
// receiver's barrier, so nobody waits until all it ever wrote to memory has arrived, as a barrier of the cluster would make it
// do. What else blocks wrote to memory is not ordered by that. One message of `bytes` in all, once.
#ifdef CLUSTER
// All threads of each block.
DEVICE void open_inbox(u64* inbox, int bytes) {
#if CLUSTER > 1
  if (threadIdx.x == 0) {
    barrier_init(smem_address(inbox), 1);
    barrier_arrive_expecting(smem_address(inbox), bytes);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
// All inboxes are open. All threads, before the first is told anything, and before a block ends.
DEVICE void inboxes_open() {
#if CLUSTER > 1
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
#if CLUSTER > 1
DEVICE u32 of_block(const void* mine, int block) {
  u32 remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(smem_address(mine)), "r"(block));
  return remote;
}
#endif
// Into a slot of `block`, which has the place of `slot` here.
DEVICE void tell(void* slot, u64* inbox, int block, u32 a, u32 b) {
#if CLUSTER > 1
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.u32 [%0], {%1, %2}, [%3];"
               ::"r"(of_block(slot, block)), "r"(a), "r"(b), "r"(of_block(inbox, block)) : "memory");
#else
  *(uint2*)slot = make_uint2(a, b);
#endif
}
DEVICE void tell(void* slot, u64* inbox, int block, u32 a, u32 b, u32 c, u32 d) {
#if CLUSTER > 1
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1, %2, %3, %4}, [%5];"
               ::"r"(of_block(slot, block)), "r"(a), "r"(b), "r"(c), "r"(d), "r"(of_block(inbox, block)) : "memory");
#else
  *(uint4*)slot = make_uint4(a, b, c, d);
#endif
}
// All words of the message are there. All threads.
DEVICE void await_inbox(u64* inbox) {
#if CLUSTER > 1
  barrier_wait(smem_address(inbox), 0);
#else
  __syncthreads();
#endif
}
#endif
