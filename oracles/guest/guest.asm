; A bare-metal guest that runs cases of address translation on any x86 machine or emulator.
;
; It boots from a disk or a floppy, moves itself to SERVER, near the end of RAM, and fills the RAM
; below with stamps. Then it waits, in 32-bit protected mode without paging, for a command in its
; mailbox: a flavor (which paging mode, natively or in a virtual machine) and a row of records. Each
; record is one access under one control state, with the entries ("pokes") that memory holds for it;
; what came of it is left in the record, and so is what became of the entries.
;
; Everything else that memory needs (page tables, descriptor tables, the worlds described below,
; control blocks) is laid out by the host: see machine.py, whose constants come in by -D.
;
; A world is what must stay reachable while tables that can hold anything are in force: an entry of
; the case's own root table leads to a few pages of ours, at linear address `base`:
;   base + 0x1000  the code page below, for the supervisor     base + 0x4000  GDT and TSS
;   base + 0x2000  the same page, for the user                 base + 0x5000  a stack
;   base + 0x3000  IDT
;
; A stamp is the 8 bytes B8 h0 h1 h2 h3 CC 5A 5A at address 8*h. Read, it tells its address;
; executed, it is "mov eax, h; int3", which tells it too; as a paging-structure entry it is not
; present. Everything ends with int3 (vector 3) or with another exception: both are reported.

; Mailbox, in doublewords from MAIL.
%define COMMAND  MAIL + 0x00
%define COUNT    MAIL + 0x04
%define STRIDE   MAIL + 0x08
%define RECORDS  MAIL + 0x0c
%define READY    MAIL + 0x10
%define CURRENT  MAIL + 0x14
%define LEFT     MAIL + 0x18
%define FEATURES MAIL + 0x20
%define HOSTKEYS MAIL + 0x40
%define OWNGDT   MAIL + 0x44     ; where our own GDT is
%define EPTCAPS  MAIL + 0x48     ; IA32_VMX_EPT_VPID_CAP, once the VMX flavor has been entered
%define table    MAIL + 0x80     ; what LGDT and LIDT read; not beside code, which emulators watch

; A record.
%define BASE     0x00            ; of the world; of a VMCB or VMCS in the virtual flavors
%define ADDRESS  0x08            ; linear, a multiple of 8
%define STUB     0x10            ; byte: which access, as an offset of the code page
%define RING     0x11            ; byte: 0 supervisor, 1 user
%define MARKER   0x12            ; byte: what a write writes
%define POKES    0x14            ; doubleword: how many
%define CR0_     0x18
%define CR3_     0x20
%define CR4_     0x28
%define EFER_    0x30
%define FLAGS_   0x38
%define PKRU_    0x40
%define PKRS_    0x44
%define STAGE    0x48            ; nested CR3 or EPT pointer, 0 for none
%define RIP_     0x50            ; where the guest of a virtual flavor starts
%define VECTOR   0x58            ; out: exception, or exit code; in (SVM): the host's EFER
%define CODE     0x60            ; out: error code, EXITINFO1, exit qualification
%define FAULT    0x68            ; out: CR2, EXITINFO2, guest-physical address
%define DATA     0x70            ; out: EAX and EDX as the access left them
%define WHERE    0x78            ; out: RIP
%define LINEAR   0x80            ; out: guest-linear address (VMX)
%define EVENT    0x88            ; out: interruption information and error code (VMX)
%define PAIRS    0x90            ; the pokes: address and value, 16 bytes each

%define CODE32   0x08
%define DATA32   0x10
%define CODE64   0x18
%define USER32   0x23
%define USERDATA 0x2b
%define USER64   0x33
%define TASK     0x38

%define CR0_OWN  0x80000031      ; PG, NE, ET, PE
%define CR4_OWN  0x00000610      ; PSE, OSFXSR, OSXMMEXCPT; PAE besides, where it is needed
%define PAE      (1 << 5)
%define LA57     (1 << 12)
%define VMXE     (1 << 13)
%define PKE      (1 << 22)
%define PKS      (1 << 24)
%define IA32_EFER 0xC0000080
%define IA32_PKRS 0x6E1

org 0x7c00
section .text
bits 16
    cli
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x7000
    mov ax, 0x0200 + SECTORS    ; read the payload; DL is the drive we come from
    mov bx, 0x7e00
    mov cx, 2
    mov dh, 0
    int 0x13
    in al, 0x92                 ; A20
    or al, 2
    and al, 0xfe
    out 0x92, al
    mov al, 0xff                ; no interrupts
    out 0x21, al
    out 0xa1, al
    lgdt [boot_gdtr]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    jmp CODE32:moving
bits 32
moving:
    mov ax, DATA32
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov esi, 0x7e00
    mov edi, SERVER
    mov ecx, SECTORS * 128
    rep movsd
    mov eax, start
    jmp eax
align 8
boot_gdt:
    dq 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF
boot_gdtr:
    dw $ - boot_gdt - 1
    dd boot_gdt
    times 510 - ($ - $$) db 0
    dw 0xaa55

section payload vstart=SERVER follows=.text align=512
bits 32
start:
    lgdt [own_gdtr]
    mov esp, STACK
    ; The local APIC answers at an address that a page could lead to: switch it off.
    mov ecx, 0x1b
    rdmsr
    and eax, ~0x800
    wrmsr
    ; What this processor has, for the host to read.
    mov edi, FEATURES
    mov eax, 1
    call feature                ; +0x00: CPUID.1 ECX and EDX
    mov eax, 7
    call feature                ; +0x08: CPUID.7 ECX and EDX
    mov [edi], ebx              ; +0x10: CPUID.7 EBX
    add edi, 4
    mov eax, 0x80000008
    cpuid
    mov [edi], eax              ; +0x14: CPUID.80000008 EAX
    add edi, 4
    mov eax, 0x80000001
    call feature                ; +0x18: CPUID.80000001 ECX and EDX
    mov dword [OWNGDT], own_gdt
    ; Stamp the RAM below.
    xor edi, edi
    xor eax, eax
.stamp:
    mov byte [edi], 0xb8
    mov [edi + 1], eax
    mov byte [edi + 5], 0xcc
    mov word [edi + 6], 0x5a5a
    inc eax
    add edi, 8
    cmp edi, SERVER
    jne .stamp
    ; So that a host can find RAM in the memory of an emulator: a mark in each 128 KBytes of the
    ; rest (below, the stamps are the marks).
    mov edi, SERVER + 0x1fff0
.mark:
    mov dword [edi], 0x5afe5afe
    mov [edi + 4], edi
    mov dword [edi + 8], ~0x5afe5afe
    mov eax, edi
    not eax
    mov [edi + 12], eax
    add edi, 0x20000
    cmp edi, RAM
    jb .mark
    mov dword [COMMAND], 0
    mov dword [READY], 0x600d600d

idle:
    mov ax, DATA32
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov esp, STACK
.wait:
    pause
    mov eax, [COMMAND]
    test eax, eax
    jz .wait
    mov ecx, [RECORDS]
    mov [CURRENT], ecx
    mov ecx, [COUNT]
    mov [LEFT], ecx
    cmp eax, LEGACY
    je legacy_32
    cmp eax, LEGACY_PAE
    je legacy_pae
    cmp eax, SVM_PAE
    je svm_pae
    jmp long_mode

feature:
    xor ecx, ecx
    cpuid
    mov [edi], ecx
    mov [edi + 4], edx
    add edi, 8
    ret

; LEGACY MODES

legacy_32:
    mov eax, CR4_OWN
    mov ebx, ROOT_32
    jmp legacy
legacy_pae:
    mov eax, CR4_OWN | PAE
    mov ebx, ROOT_PAE
legacy:
    mov cr4, eax
    mov cr3, ebx
    mov eax, CR0_OWN
    mov cr0, eax
    mov ax, USERDATA            ; a selector that both rings may use, and an IRET keeps
    mov ds, ax
    mov es, ax
next_32:
    cmp dword [LEFT], 0
    je legacy_done
    mov edi, [CURRENT]
    call poke_32
    mov ebp, [edi + BASE]
    call world_32
    ; EFER; there is just one if there is long mode
    mov ecx, IA32_EFER
    mov eax, [edi + EFER_]
    mov edx, [edi + EFER_ + 4]
    wrmsr
    ; The frame for the IRET that starts the access
    movzx eax, byte [edi + STUB]
    lea eax, [ebp + eax + 0x1000 + stubs - code_page]
    mov ecx, CODE32
    cmp byte [edi + RING], 0
    je .supervisor
    add eax, 0x1000
    mov ecx, USER32
.supervisor:
    lea esp, [ebp + 0x5e00]
    push dword USERDATA
    lea edx, [ebp + 0x5d00]
    push edx
    push dword [edi + FLAGS_]
    push ecx
    push eax
    xor eax, eax
    mov cr2, eax
    mov ebx, [edi + ADDRESS]
    mov esi, ebx
    xor esi, 8
    mov edx, [edi + CR4_]
    mov ecx, [edi + CR0_]
    lea eax, [ebp + 0x1000 + enter_32 - code_page]
    movzx ebp, byte [edi + MARKER]
    mov edi, [edi + CR3_]
    jmp eax
done_32:
    mov esp, STACK
    push dword 2
    popfd
    mov ebx, [CURRENT]
    mov [ebx + VECTOR], ecx
    mov [ebx + CODE], edi
    mov [ebx + FAULT], esi
    mov [ebx + WHERE], ebp
    mov [ebx + DATA], eax
    mov [ebx + DATA + 4], edx
    mov edi, ebx
    mov ecx, IA32_EFER
    xor eax, eax
    xor edx, edx
    wrmsr
    call gather_32
    mov eax, [STRIDE]
    add [CURRENT], eax
    dec dword [LEFT]
    jmp next_32
legacy_done:
    lgdt [own_gdtr]
    mov eax, 0x31
    mov cr0, eax
    xor eax, eax
    mov cr4, eax
    mov [COMMAND], eax
    jmp idle

; SVM with a host in PAE paging, which the nested tables then have the format of. The guest is in
; 64-bit mode as under `svm` below; the addresses that it starts with have 32 bits.
svm_pae:
    mov eax, CR4_OWN | PAE
    mov ebx, ROOT_PAE
    mov cr4, eax
    mov cr3, ebx
    mov eax, CR0_OWN
    mov cr0, eax
    mov ecx, IA32_EFER
    mov eax, 0x1000
    xor edx, edx
    wrmsr
    mov ecx, 0xC0010117         ; VM_HSAVE_PA
    mov eax, HSAVE
    wrmsr
.next:
    cmp dword [LEFT], 0
    je .end
    mov edi, [CURRENT]
    call poke_32
    mov ecx, IA32_EFER
    mov eax, [edi + VECTOR]
    xor edx, edx
    wrmsr
    mov ebp, [edi + BASE]
%macro COPY 4                   ; 8 bytes: to base and offset, from base and offset
    mov eax, [%3 + %4]
    mov [%1 + %2], eax
    mov eax, [%3 + %4 + 4]
    mov [%1 + %2 + 4], eax
%endmacro
    COPY ebp, 0x558, edi, CR0_
    COPY ebp, 0x550, edi, CR3_
    COPY ebp, 0x548, edi, CR4_
    COPY ebp, 0x4d0, edi, EFER_
    or dword [ebp + 0x4d0], 0x1000
    COPY ebp, 0x570, edi, FLAGS_
    COPY ebp, 0x578, edi, RIP_
    COPY ebp, 0x0b0, edi, STAGE
    xor eax, eax
    mov [ebp + 0x0c0], eax      ; no VMCB field is cached
%macro CLEAR 1
    mov [ebp + %1], eax
    mov [ebp + %1 + 4], eax
%endmacro
    CLEAR 0x0a8
    CLEAR 0x640
    CLEAR 0x070
    CLEAR 0x078
    CLEAR 0x080
    CLEAR 0x5f8
    mov byte [ebp + 0x090], 1
    mov dword [ebp + 0x05c], 1  ; flush the TLB
    mov ebx, [edi + ADDRESS]
    mov esi, ebx
    xor esi, 8
    movzx ecx, byte [edi + MARKER]
    xor edx, edx
    mov eax, ebp
    clgi
    vmrun
    mov esp, STACK
    mov edi, [CURRENT]
    mov ebp, [edi + BASE]
    mov [edi + DATA + 4], edx
    mov eax, [ebp + 0x5f8]
    mov [edi + DATA], eax
    COPY edi, VECTOR, ebp, 0x070
    COPY edi, CODE, ebp, 0x078
    COPY edi, FAULT, ebp, 0x080
    COPY edi, WHERE, ebp, 0x578
    COPY edi, EVENT, ebp, 0x088
    call gather_32
    mov eax, [STRIDE]
    add [CURRENT], eax
    dec dword [LEFT]
    jmp .next
.end:
    stgi
    mov ecx, IA32_EFER
    xor eax, eax
    xor edx, edx
    wrmsr
    jmp legacy_done

; Load the descriptor tables of the world at EBP.
world_32:
    lea eax, [ebp + 0x4000]
    mov word [table], 0x47
    mov [table + 2], eax
    lgdt [table]
    and byte [ebp + 0x4000 + TASK + 5], ~2
    mov ax, TASK
    ltr ax
    lea eax, [ebp + 0x3000]
    mov word [table], 0xff
    mov [table + 2], eax
    lidt [table]
    ret

; Write the entries of the record at EDI.
poke_32:
    mov ecx, [edi + POKES]
    lea esi, [edi + PAIRS]
    jecxz .end
.next:
    mov ebx, [esi]
    mov eax, [esi + 8]
    mov edx, [esi + 12]
    mov [ebx], eax
    mov [ebx + 4], edx
    add esi, 16
    dec ecx
    jnz .next
.end:
    ret

; Read them back into the record, and leave stamps where they and a write were.
gather_32:
    mov ecx, [edi + POKES]
    lea esi, [edi + PAIRS]
    jecxz .write
.next:
    mov ebx, [esi]
    mov eax, [ebx]
    mov edx, [ebx + 4]
    mov [esi + 8], eax
    mov [esi + 12], edx
    add esi, 16
    dec ecx
    jnz .next
.write:
    mov ebx, [edi + DATA]
    call .unmark
    mov ebx, [edi + DATA + 4]
    xor ebx, 1
    call .unmark
    mov ecx, [edi + POKES]
    lea esi, [edi + PAIRS]
    jecxz .end
.stamp:
    mov ebx, [esi]
    mov eax, ebx
    shr eax, 3
    mov byte [ebx], 0xb8
    mov [ebx + 1], eax
    mov byte [ebx + 5], 0xcc
    mov word [ebx + 6], 0x5a5a
    add esi, 16
    dec ecx
    jnz .stamp
.end:
    ret
.unmark:
    cmp ebx, SERVER / 8
    jae .none
    cmp [ebx * 8 + 1], ebx
    jne .none
    mov byte [ebx * 8 + 7], 0x5a
.none:
    ret

; LONG MODES

long_mode:
    mov ecx, IA32_EFER
    mov edx, 0
    mov eax, 0x100
    wrmsr
    mov eax, CR4_OWN | PAE
    mov ebx, ROOT_4
    cmp dword [COMMAND], LONG_5
    je .five
    cmp dword [COMMAND], SVM_5
    jne .four
.five:
    or eax, LA57
    mov ebx, ROOT_5
.four:
    mov cr4, eax
    mov cr3, ebx
    mov eax, CR0_OWN
    mov cr0, eax
    jmp CODE64:long_64
long_done:
    mov ax, DATA32              ; an IRET to ring 3 has cleared DS
    mov ds, ax
    mov eax, 0x31
    mov cr0, eax
    mov ecx, IA32_EFER
    xor eax, eax
    xor edx, edx
    wrmsr
    xor eax, eax
    mov cr4, eax
    mov [COMMAND], eax
    jmp idle

bits 64
default abs
long_64:
    mov rsp, STACK
    cmp dword [COMMAND], SVM
    je svm
    cmp dword [COMMAND], SVM_5
    je svm
    cmp dword [COMMAND], VMX
    je vmx
next_64:
    cmp dword [LEFT], 0
    je leave_64
    mov r15d, [CURRENT]
    call poke_64
    mov r13, [r15 + BASE]
    ; Descriptor tables of the world
    lea rax, [r13 + 0x4000]
    mov word [table], 0x47
    mov [table + 2], rax
    lgdt [table]
    and byte [r13 + 0x4000 + TASK + 5], ~2
    mov ax, TASK
    ltr ax
    lea rax, [r13 + 0x3000]
    mov word [table], 0x1ff
    mov [table + 2], rax
    lidt [table]
    ; The frame for the IRET that starts the access
    movzx eax, byte [r15 + STUB]
    lea rax, [r13 + rax + 0x1000 + stubs - code_page]
    mov ecx, CODE64
    mov edx, DATA32
    cmp byte [r15 + RING], 0
    je .supervisor
    add rax, 0x1000
    mov ecx, USER64
    mov edx, USERDATA
.supervisor:
    lea rsp, [r13 + 0x5e00]
    push rdx
    lea rdx, [r13 + 0x5d00]
    push rdx
    push qword [r15 + FLAGS_]
    push rcx
    push rax
    ; The control state, as far as it can be set while our own tables are in force
    mov ecx, IA32_EFER
    mov eax, [r15 + EFER_]
    mov edx, [r15 + EFER_ + 4]
    wrmsr
    test dword [r15 + CR4_], PKS
    jz .no_supervisor_keys
    mov ecx, IA32_PKRS
    mov eax, [r15 + PKRS_]
    xor edx, edx
    wrmsr
.no_supervisor_keys:
    xor eax, eax
    mov cr2, rax
    mov rbx, [r15 + ADDRESS]
    mov rsi, rbx
    xor rsi, 8
    mov r8, [r15 + CR4_]
    mov r9, [r15 + CR0_]
    mov r10, [r15 + CR3_]
    mov r11d, [r15 + PKRU_]
    movzx ebp, byte [r15 + MARKER]
    lea rax, [r13 + 0x1000 + enter_64 - code_page]
    jmp rax
done_64:
    mov rsp, STACK
    push 2
    popfq
    mov r15d, [CURRENT]
    mov [r15 + VECTOR], rcx
    mov [r15 + CODE], rdi
    mov [r15 + FAULT], rsi
    mov [r15 + WHERE], rbp
    mov [r15 + DATA], eax
    mov [r15 + DATA + 4], edx
    mov ecx, IA32_EFER
    mov eax, 0x100
    xor edx, edx
    wrmsr
    call gather_64
    mov eax, [STRIDE]
    add [CURRENT], eax
    dec dword [LEFT]
    jmp next_64
leave_64:
    mov rsp, STACK
    lgdt [own_gdtr]
    push CODE32
    push long_done
    o64 retf

poke_64:
    mov ecx, [r15 + POKES]
    lea rsi, [r15 + PAIRS]
    jrcxz .end
.next:
    mov rbx, [rsi]
    mov rax, [rsi + 8]
    mov [rbx], rax
    add rsi, 16
    dec ecx
    jnz .next
.end:
    ret

gather_64:
    mov ecx, [r15 + POKES]
    lea rsi, [r15 + PAIRS]
    jrcxz .write
.next:
    mov rbx, [rsi]
    mov rax, [rbx]
    mov [rsi + 8], rax
    add rsi, 16
    dec ecx
    jnz .next
.write:
    mov ebx, [r15 + DATA]
    call .unmark
    mov ebx, [r15 + DATA + 4]
    xor ebx, 1
    call .unmark
    mov ecx, [r15 + POKES]
    lea rsi, [r15 + PAIRS]
    jrcxz .end
    mov rdi, 0x5a5acc00000000b8
.stamp:
    mov rbx, [rsi]
    mov rax, rbx
    shl rax, 5                  ; the index, at bit 8
    or rax, rdi
    mov [rbx], rax
    add rsi, 16
    dec ecx
    jnz .stamp
.end:
    ret
.unmark:
    cmp ebx, SERVER / 8
    jae .none
    cmp [rbx * 8 + 1], ebx
    jne .none
    mov byte [rbx * 8 + 7], 0x5a
.none:
    ret

; SVM: the host has prepared a VMCB for each kind of code segment and ring. EFER.SVME is ours while
; the flavor is in force, and so is CR4.PKE, since PKRU is not in a VMCB.

svm:
    mov ecx, IA32_EFER
    mov eax, 0x1100
    xor edx, edx
    wrmsr
    mov ecx, 0xC0010117         ; VM_HSAVE_PA
    mov eax, HSAVE
    xor edx, edx
    wrmsr
    call own_keys
.next:
    cmp dword [LEFT], 0
    je .end
    mov r15d, [CURRENT]
    call poke_64
    call guest_keys
    mov ecx, IA32_EFER          ; the host's: its NXE counts for nested page tables
    mov eax, [r15 + VECTOR]
    xor edx, edx
    wrmsr
    mov r14, [r15 + BASE]
    mov rax, [r15 + CR0_]
    mov [r14 + 0x558], rax
    mov rax, [r15 + CR3_]
    mov [r14 + 0x550], rax
    mov rax, [r15 + CR4_]
    mov [r14 + 0x548], rax
    mov rax, [r15 + EFER_]
    or eax, 0x1000
    mov [r14 + 0x4d0], rax
    mov rax, [r15 + FLAGS_]
    mov [r14 + 0x570], rax
    mov rax, [r15 + RIP_]
    mov [r14 + 0x578], rax
    xor eax, eax
    mov [r14 + 0x0c0], eax      ; no VMCB field is cached
    mov [r14 + 0x0a8], rax      ; nothing is injected
    mov [r14 + 0x640], rax      ; CR2
    mov [r14 + 0x070], rax
    mov [r14 + 0x078], rax
    mov [r14 + 0x080], rax
    mov [r14 + 0x5f8], rax      ; RAX
    mov rax, [r15 + STAGE]
    mov [r14 + 0x0b0], rax
    test rax, rax
    setnz al
    mov [r14 + 0x090], al
    mov dword [r14 + 0x05c], 1  ; flush the TLB
    mov rbx, [r15 + ADDRESS]
    mov rsi, rbx
    xor rsi, 8
    movzx ecx, byte [r15 + MARKER]
    xor edx, edx
    mov rax, r14
    clgi
    vmrun
    mov rsp, STACK
    mov r15d, [CURRENT]
    mov r14, [r15 + BASE]
    mov [r15 + DATA + 4], edx
    mov rax, [r14 + 0x5f8]
    mov [r15 + DATA], eax
    mov rax, [r14 + 0x070]
    mov [r15 + VECTOR], rax
    mov rax, [r14 + 0x078]
    mov [r15 + CODE], rax
    mov rax, [r14 + 0x080]
    mov [r15 + FAULT], rax
    mov rax, [r14 + 0x578]
    mov [r15 + WHERE], rax
    mov rax, [r14 + 0x088]      ; EXITINTINFO: an event that was being delivered
    mov [r15 + EVENT], rax
    call gather_64
    mov eax, [STRIDE]
    add [CURRENT], eax
    dec dword [LEFT]
    jmp .next
.end:
    stgi
    mov ecx, IA32_EFER
    mov eax, 0x100
    xor edx, edx
    wrmsr
    jmp leave_64

; CR4.PKE, if the host says that there is one.
own_keys:
    cmp dword [HOSTKEYS], 0
    je .none
    mov rax, cr4
    or eax, PKE
    mov cr4, rax
.none:
    ret

; PKRU as the record at R15 has it, and PKRS.
guest_keys:
    cmp dword [HOSTKEYS], 0
    je .no_keys
    mov eax, [r15 + PKRU_]
    xor ecx, ecx
    xor edx, edx
    wrpkru
.no_keys:
    test dword [r15 + CR4_], PKS
    jz .none
    mov ecx, IA32_PKRS
    mov eax, [r15 + PKRS_]
    xor edx, edx
    wrmsr
.none:
    ret

; VMX: the host has prepared a list of field values for each kind of code segment and ring, which
; BASE names: the physical address of a VMCS region, followed a page later by the count of the
; fields and the pairs of encoding and value.

vmx:
    mov ecx, 0x3a               ; IA32_FEATURE_CONTROL
    rdmsr
    test al, 1
    jnz .locked
    or eax, 5
    wrmsr
.locked:
    mov rax, cr4
    or eax, VMXE
    mov cr4, rax
    mov ecx, 0x480              ; IA32_VMX_BASIC: the revision
    rdmsr
    mov [VMXON_REGION], eax
    push VMXON_REGION
    vmxon [rsp]
    pop rax
    mov ecx, 0x48c
    rdmsr
    mov [EPTCAPS], eax
    mov [EPTCAPS + 4], edx
    call own_keys
.next:
    cmp dword [LEFT], 0
    je .end
    mov r15d, [CURRENT]
    call poke_64
    call guest_keys
    mov r14, [r15 + BASE]
    mov eax, [VMXON_REGION]
    mov [r14], eax
    push r14
    vmclear [rsp]
    vmptrld [rsp]
    pop rax
    cmp dword [r14 + 0x1008], 0
    jne .prepared
    mov rcx, [r14 + 0x1000]
    lea rsi, [r14 + 0x1010]
.field:
    lodsq
    mov rdx, rax
    lodsq
    vmwrite rdx, rax
    jbe .refused
    dec rcx
    jnz .field
    mov dword [r14 + 0x1008], 1
.prepared:
%macro FIELD 2
    mov edx, %1
    mov rax, [r15 + %2]
    vmwrite rdx, rax
    jbe .refused
%endmacro
    FIELD 0x6800, CR0_
    FIELD 0x6802, CR3_
    FIELD 0x6804, CR4_
    FIELD 0x2806, EFER_
    FIELD 0x6820, FLAGS_
    FIELD 0x681e, RIP_
    mov rcx, [r15 + STAGE]
    mov edx, 0x401e             ; secondary controls: EPT
    xor eax, eax
    test rcx, rcx
    jz .no_ept
    mov eax, 2
    vmwrite rdx, rax
    mov edx, 0x201a
    mov rax, rcx
.no_ept:
    vmwrite rdx, rax
    mov edx, 0x6c14             ; host RSP
    mov rax, STACK
    vmwrite rdx, rax
    mov edx, 0x6c16             ; host RIP
    mov rax, .exit
    vmwrite rdx, rax
    xor eax, eax
    mov cr2, rax
    mov rbx, [r15 + ADDRESS]
    mov rsi, rbx
    xor rsi, 8
    movzx ecx, byte [r15 + MARKER]
    xor edx, edx
    vmlaunch
.refused:
    mov rsp, STACK
    mov r15d, [CURRENT]
    mov rax, 0xbad
    mov [r15 + VECTOR], rax
    mov [r15 + CODE], rdx
    mov edx, 0x4400             ; VM-instruction error
    vmread rax, rdx
    mov [r15 + FAULT], rax
    jmp .over
.exit:
    mov r15d, [CURRENT]
    mov [r15 + DATA], eax
    mov [r15 + DATA + 4], edx
%macro TAKE 2
    mov edx, %1
    vmread rax, rdx
    mov [r15 + %2], rax
%endmacro
    TAKE 0x4402, VECTOR
    TAKE 0x6400, CODE
    TAKE 0x2400, FAULT
    TAKE 0x640a, LINEAR
    TAKE 0x681e, WHERE
    mov edx, 0x4404
    vmread rax, rdx
    mov [r15 + EVENT], eax
    mov edx, 0x4406
    vmread rax, rdx
    mov [r15 + EVENT + 4], eax
.over:
    call gather_64
    mov eax, [STRIDE]
    add [CURRENT], eax
    dec dword [LEFT]
    jmp .next
.end:
    vmxoff
    mov rax, cr4
    and eax, ~(VMXE)
    mov cr4, rax
    jmp leave_64

align 8
own_gdt:
    dq 0
    dq 0x00CF9B000000FFFF       ; CODE32
    dq 0x00CF93000000FFFF       ; DATA32
    dq 0x00AF9B000000FFFF       ; CODE64
    dq 0x00CFFB000000FFFF       ; USER32
    dq 0x00CFF3000000FFFF       ; USERDATA
    dq 0x00AFFB000000FFFF       ; USER64
    dq 0, 0                     ; TASK, in worlds only
own_gdtr:
    dw $ - own_gdt - 1
    dq own_gdt

; THE CODE PAGE, part of every world

    times 0x1000 - ($ - $$) db 0
code_page:
; The accesses: one of their offsets is a record's STUB. The bytes mean the same in 32-bit and in
; 64-bit mode. After the access, EAX and EDX tell the stamps of its word and of the next one.
stubs:
stub_read:
    db 0x8a, 0x0b               ; mov cl, [rbx]
    db 0x8b, 0x43, 0x01         ; mov eax, [rbx + 1]
    db 0x8b, 0x56, 0x01         ; mov edx, [rsi + 1]
    int3
    times 0x10 - ($ - stubs) nop
stub_write:
    db 0x88, 0x4b, 0x07         ; mov [rbx + 7], cl
    db 0x8b, 0x43, 0x01
    db 0x8b, 0x56, 0x01
    int3
    times 0x20 - ($ - stubs) nop
stub_fetch:
    db 0xff, 0xe3               ; jmp rbx
    times 0x40 - ($ - stubs) nop

bits 64
; R8, R9, R10: the case's CR4, CR0, CR3. R11: PKRU. RBP: the marker. Memory is not touched until
; the case's tables are in force: its keys may forbid ours.
enter_64:
    mov cr4, r8
    bt r8, 22
    jnc .no_keys
    xor ecx, ecx
    xor edx, edx
    mov eax, r11d
    wrpkru
.no_keys:
    mov cr0, r9
    mov cr3, r10
    mov ecx, ebp
    xor eax, eax
    xor edx, edx
    iretq
common_64:
    pop rcx
    pop rdi
    pop rbp
    mov rsi, cr2
    mov rbx, cr4
    and ebx, LA57
    mov r8, ROOT_4
    jz .four
    mov r8, ROOT_5
.four:
    or ebx, CR4_OWN | PAE
    mov cr4, rbx
    mov ebx, CR0_OWN
    mov cr0, rbx
    mov cr3, r8
    mov rbx, done_64
    jmp rbx

bits 32
; EDX, ECX, EDI: the case's CR4, CR0, CR3. EBP: the marker.
enter_32:
    mov cr4, edx
    mov cr0, ecx
    mov cr3, edi
    mov ecx, ebp
    xor eax, eax
    xor edx, edx
    iretd
common_32:
    pop ecx
    pop edi
    pop ebp
    mov esi, cr2
    mov ebx, cr4
    and ebx, PAE
    or ebx, CR4_OWN
    mov cr4, ebx
    test ebx, PAE
    mov ebx, ROOT_32
    jz .not_pae
    mov ebx, ROOT_PAE
.not_pae:
    mov cr3, ebx
    mov ebx, CR0_OWN
    mov cr0, ebx
    mov ebx, done_32
    jmp ebx

; One entry for each exception, 16 bytes apart: push 0 in place of an error code where there is
; none, then the vector.
%macro VECTORS 1
%assign vector 0
%rep 32
    align 16
    %if vector != 8 && (vector < 10 || vector > 14) && vector != 17 && vector != 21 && vector != 29 && vector != 30
    push byte 0
    %endif
    push byte vector
    jmp near %1
%assign vector vector + 1
%endrep
%endmacro
    times 0x200 - ($ - code_page) db 0xcc
bits 64
    VECTORS common_64
    times 0x400 - ($ - code_page) db 0xcc
bits 32
    VECTORS common_32
    times 0x1000 - ($ - code_page) db 0xcc
    times SECTORS * 512 - ($ - $$) db 0
